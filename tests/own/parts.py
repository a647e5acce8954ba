"""Parts of a reader's own, in one file outside the package: it imports `llm_lab` and nothing of it
is edited. Each says where it stands in a configuration; `register` lets a saved model name it.

`CASES` has a configuration for each; tests/test_own_file.py trains, saves and opens them all."""

import torch
from torch import nn
from torch.nn import functional as F

import llm_lab as lab
from llm_lab.parts import Part
from llm_lab.self_attention import dense_mask
from llm_lab.sparse import alternate

part = lab.part


# ---- attn.transforms


@lab.register
class ALiBi(Part):
    """A bias on scores, −m·(i − j), m = 2^(−8h/H) of head h = 1, …, H (Press et al. 2022, §3).

    The part −m·i is the same for all keys of a query, so softmax does not see it. The other, m·j,
    is the product of one channel more: m in q, j in k. Values stay as wide as they were."""

    def __init__(self, cfg, layer=0):
        super().__init__()
        heads = torch.arange(1, cfg.n_heads + 1)
        self.register_buffer('slopes', 2 ** (-8 * heads / cfg.n_heads), persistent=False)

    def forward(self, q, k, v, i, j, **ctx):
        D = q.shape[-1]
        # attention divides by √(D + 1) now, and not by √D
        q = q * ((D + 1) / D) ** 0.5
        slopes = self.slopes * (D + 1) ** 0.5
        slopes = slopes.view(1, -1, 1, 1).expand(len(q), -1, q.shape[2], 1).to(q)
        at = (j if j.dim() == 2 else j[None])[:, None, :, None]  # (B or 1, 1, S, 1)
        at = at.expand(*k.shape[:3], 1).to(k)
        return torch.cat([q, slopes], -1), torch.cat([k, at], -1), v, i, j


# ---- attn: mixers


@lab.register
class MLA(Part):
    """Multi-head latent attention: all keys and values are made of `rank` numbers a token, and
    those alone are remembered (DeepSeek-AI 2024, §2.1, without its rotated channels)"""

    needs = ('cache',)

    def __init__(self, cfg, layer=0, rank=8):
        super().__init__()
        self.n_heads = cfg.n_heads
        width = cfg.n_heads * cfg.head_dim
        self.q = nn.Linear(cfg.d_model, width, bias=False)
        self.down = nn.Linear(cfg.d_model, rank, bias=False)
        self.norm = lab.RMSNorm(rank)
        self.up = nn.Linear(rank, 2 * width, bias=False)  # keys and values
        self.out = nn.Linear(width, cfg.d_model, bias=False)

    def cache(self, batch, length):
        return {}  # latents (B, S, rank) and their positions, once there are some

    def forward(self, x, i, cache=None, **ctx):
        latent, j = self.norm(self.down(x)), i
        if cache is not None:
            kept = cache[self]
            if kept:
                latent = torch.cat([kept['latent'], latent], 1)
                j = torch.cat([kept['j'], j], -1)
            kept.update(latent=latent, j=j)
        k, v = self._heads(self.up(latent)).chunk(2, 1)
        mask = dense_mask(lab.causal, i, j)
        y = F.scaled_dot_product_attention(self._heads(self.q(x)), k, v, mask)
        return self.out(y.transpose(1, 2).flatten(2))

    def _heads(self, x):  # (B, S, width) or twice that → (B, H or 2H, S, D)
        head_dim = self.q.out_features // self.n_heads
        return x.unflatten(-1, (-1, head_dim)).transpose(1, 2)


class State:
    "What linear attention keeps: sums that do not grow with the text"

    endless = True

    def __init__(self):
        self.sums = None

    def pick(self, rows):
        self.sums = [s[rows] for s in self.sums]


@lab.register
class LinearAttention(Part):
    "Σ φ(k)·v over the past, read by φ(q), with φ = elu + 1 (Katharopoulos et al. 2020, eq. 9)"

    needs = ('cache',)

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.sizes = 3 * (cfg.n_heads * cfg.head_dim,)
        self.qkv = nn.Linear(cfg.d_model, sum(self.sizes), bias=False)
        self.out = nn.Linear(self.sizes[0], cfg.d_model, bias=False)

    def cache(self, batch, length):
        return State()

    def forward(self, x, i, cache=None, **ctx):
        q, k, v = (
            t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for t in self.qkv(x).split(self.sizes, -1)
        )  # (B, H, T, D) each
        q, k = F.elu(q) + 1, F.elu(k) + 1
        padding = (i if i.dim() == 2 else i[None])[:, None, :, None] < 0
        k = k.masked_fill(padding, 0.0)
        products = (k[..., :, None] * v[..., None, :]).cumsum(2)  # (B, H, T, D, D)
        weights = k.cumsum(2)
        if cache is not None:
            kept = cache[self]
            if kept.sums is not None:
                products = products + kept.sums[0][:, :, None]
                weights = weights + kept.sums[1][:, :, None]
            kept.sums = [products[:, :, -1], weights[:, :, -1]]
        y = torch.einsum('bhtd,bhtde->bhte', q, products)
        y = y / ((q * weights).sum(-1, keepdim=True) + 1e-6)
        return self.out(y.transpose(1, 2).flatten(2))


# ---- mlp


@lab.register
class ShiftedMLP(lab.MLP):
    """An MLP that reads half of the channels of the token before (token shift, Peng et al. 2023):
    a second memory in its layer, beside that of attention"""

    needs = ('cache',)

    def cache(self, batch, length):
        return {}

    def forward(self, x, i, cache=None, **ctx):
        kept = {} if cache is None else cache[self]
        before = kept.get('last', torch.zeros_like(x[:, :1]))
        shifted = torch.cat([before, x[:, :-1]], 1)
        shifted = shifted.masked_fill(i[..., None] < 1, 0.0)  # nothing stands before position 0
        kept['last'] = x[:, -1:]
        half = x.shape[-1] // 2
        return super().forward(torch.cat([x[..., :half], shifted[..., half:]], -1), **ctx)


@lab.register
class CosineRouter(Part):
    "Experts by the angle between a token and a direction of each (Chi et al. 2022)"

    def __init__(self, cfg, layer=0, *, n_experts, top_k):
        super().__init__()
        self.layer, self.top_k = layer, top_k
        self.weight = nn.Parameter(torch.randn(n_experts, cfg.d_model))
        self.seen = torch.zeros(n_experts)

    def forward(self, x, aux=None):  # (N, C) → weights (N, k), chosen (N, k), load (E,)
        share = (10 * F.normalize(x, dim=-1) @ F.normalize(self.weight, dim=-1).T).softmax(-1)
        w, chosen = share.topk(self.top_k)
        load = F.one_hot(chosen, len(self.weight)).sum((0, 1)).float()
        if aux is not None:
            balance = len(self.weight) * (load / load.sum() * share.mean(0)).sum()
            aux.add(self.layer, loss=0.01 * balance, chosen=chosen, load=load / load.sum())
        return w, chosen, load


@lab.register
def expert_choice(logits, top_k, bias, training=False):
    """In training each expert chooses its tokens, N·k/E of them (Zhou et al. 2022, §3.2), and a
    token may have any number of experts. That looks at all tokens of the batch, the later ones
    too: so a text that is written lets each token choose its k."""
    share = logits.softmax(-1)  # (N, E)
    N, E = share.shape
    if not training:
        w, chosen = (share + bias).topk(top_k)
        return w, chosen, share
    taken = share.topk(max(1, N * top_k // E), dim=0).indices  # (tokens of an expert, E)
    w = share * torch.zeros_like(share).scatter(0, taken, 1.0)
    return w, torch.arange(E, device=w.device).expand(N, E), share


# ---- norm, block, lm_head


@lab.register
class DyT(Part):
    "tanh(a·x)·w + b in the place of a norm (Zhu et al. 2025, §4)"

    def __init__(self, d, alpha=0.5):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha))
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x):
        return torch.tanh(self.alpha * x) * self.weight + self.bias


@lab.register
class MyParallelBlock(Part):
    "x + attention(norm(x)) + mlp(norm(x)), each with a norm of its own (GPT-NeoX)"

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.norm1, self.attn = cfg.norm(cfg.d_model), cfg.attn(cfg, layer)
        self.norm2, self.mlp = cfg.norm(cfg.d_model), cfg.mlp(cfg, layer)

    def forward(self, x, i, **ctx):
        return x + self.attn(self.norm1(x), i, **ctx) + self.mlp(self.norm2(x), i=i, **ctx)


@lab.register
class MySandwichBlock(Part):
    "Norms before and after; its mixer has another name than in `Block`"

    def __init__(self, cfg, layer=0):
        super().__init__()
        self.mixer, self.mlp = cfg.attn(cfg, layer), cfg.mlp(cfg, layer)
        self.norms = nn.ModuleList(cfg.norm(cfg.d_model) for _ in range(4))

    def forward(self, x, i, **ctx):
        x = x + self.norms[1](self.mixer(self.norms[0](x), i, **ctx))
        return x + self.norms[3](self.mlp(self.norms[2](x), i=i, **ctx))


@lab.register
class TwoAttentions(Part):
    "A block with a second attention, whose recipe is a keyword: two caches in one layer"

    def __init__(self, cfg, layer=0, *, second):
        super().__init__()
        self.norms = nn.ModuleList(cfg.norm(cfg.d_model) for _ in range(3))
        self.attn, self.second = cfg.attn(cfg, layer), second(cfg, layer)
        self.mlp = cfg.mlp(cfg, layer)

    def forward(self, x, i, **ctx):
        x = x + self.attn(self.norms[0](x), i, **ctx) + self.second(self.norms[1](x), i, **ctx)
        return x + self.mlp(self.norms[2](x), i=i, **ctx)


@lab.register
class TwoTokenHead(nn.Linear):
    "An `lm_head` with a second one, for the token after the next (Gloeckle et al. 2024, §2)"

    def __init__(self, d, vocab_size):
        super().__init__(d, vocab_size, bias=False)
        self.later = nn.Linear(d, vocab_size, bias=False)


def two_token_loss(model, rows):
    "Of the next token, and half as much of the one after it"
    x = model.features(rows[:, :-1])  # (B, T, C)
    later = F.cross_entropy(model.lm_head.later(x[:, :-1]).mT, rows[:, 2:])
    return F.cross_entropy(model.lm_head(x).mT, rows[:, 1:]) + 0.5 * later


# ---- a configuration for each

SIZES = dict(vocab_size=17, d_model=32, n_layers=2, n_heads=4, max_len=24)
bare = part(lab.Attention, transforms=(), bias=False)


def llama(**settings):
    return lab.llama(**SIZES | settings)


def learned(**settings):
    return lab.GPTConfig(**SIZES | settings)


experts = dict(n_experts=4, top_k=2)
CASES = {
    'ALiBi': llama(attn=part(lab.Attention, transforms=(part(ALiBi),))),
    'MLA': learned(attn=part(MLA)),
    'DyT': llama(norm=part(DyT)),
    'a parallel block': llama(block=part(MyParallelBlock)),
    'sandwich norms': llama(block=part(MySandwichBlock)),
    'linear attention': llama(attn=part(LinearAttention)),
    'linear attention in turns': llama(
        attn=part(alternate, of=(part(LinearAttention), part(lab.Attention)))
    ),
    'attention and MLP remember': llama(mlp=part(ShiftedMLP)),
    'two attentions': llama(block=part(TwoAttentions, second=bare)),
    'a router': llama(mlp=part(lab.MoE, router=part(CosineRouter), **experts)),
    'expert choice': llama(
        mlp=part(lab.MoE, router=part(lab.Router, choose=part(expert_choice)), **experts)
    ),
    'two tokens': llama(lm_head=part(TwoTokenHead)),
}
LOSSES = {'two tokens': two_token_loss}  # the others: of the next token
