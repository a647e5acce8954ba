"""A book that is a library: build a language model from one character up, and keep it.

    import llm_lab as lab

    corpus = lab.load_corpus('tiny_tales')  # or 'tiny_shakespeare', or a path to your own
    tok = lab.BPETokenizer.train(corpus.documents('train'), vocab_size=1024)
    cfg = lab.llama(vocab_size=tok.vocab_size, d_model=128, n_layers=4, n_heads=4, max_len=128)
    model = lab.MiniGPT(cfg)
    state = lab.fit(model, lab.batches(corpus, tok, batch_size=16, length=128), steps=500, lr=4e-3)
    print(lab.evaluate(model, tok, corpus))  # loss, perplexity, bits per byte, 95 % interval
    print(lab.sample(model, tok, 'One day', max_new_tokens=200, temperature=0.8))
    lab.save('artifacts/mine', model, tok, dict(data='tiny_tales', corpus_sha256=corpus.sha256))
    model, tok, about = lab.load('artifacts/mine')
    lab.to_hf('artifacts/mine_hf', model, tok)

Text         load_corpus, Corpus, tiny_tales, CharTokenizer, BPETokenizer, load_tokenizer, pack
Models       MiniGPT, GPTConfig, llama, part, register; parts to put in: Attention, GQA, MLP,
             SwiGLU, MoE, RMSNorm, RoPE, ParallelBlock, SparseAttention; masks: causal,
             sliding_window, …; Part is the base class of your own, with every hook;
             Objective that of what a model is trained for: diffusion_llama fills in blanks
Training     batches, fit, adamw, muon, train_step, plot_loss; from a config: train_run, RunConfig
Evaluation   evaluate, score, compare
Writing      sample, stream, complete, infill; sooner: for_inference, with_kv_cache
Tuning       add_lora, merge_lora, DPO, grpo; a conversation: Chat, ChatTemplate, load_template,
             add_marks, chat_window
Looking      attention_maps, hidden_states, logit_lens, attention_map, plot_attention, playground
Keeping      save, load, load_or_train, to_hf, from_hf, find_model

`help(lab.fit)` says what each argument is. A chapter's other names are in its module, such as
`llm_lab.evaluation`; `dir(lab)` lists these here. Nothing is imported before it is asked for."""

import os

__version__ = "0.2.0"

# OpenMP's threads meet after every operation, and a thread that waits there spins, which keeps a core
# from the very thread it waits for when another program runs, too: a step then takes several times
# as long. A short spin costs little where the machine is idle (experiments/busy_machine). OpenMP reads
# this once, when PyTorch is loaded, so it stands here; whoever has chosen already is obeyed.
if not {'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'} & os.environ.keys():
    os.environ['GOMP_SPINCOUNT'] = '2000'

# {module: the names of it that stand at the root}; no `__all__`, which help() would write out
_ROOT = dict(
    core='check home LabError',
    hardware='device',
    corpora='Corpus load_corpus',
    config='read_config RunConfig',
    chars='CharTokenizer load_tokenizer Tokenizer',
    bpe='BPETokenizer',
    tales='tiny_tales',
    batching='BatchStream',
    packing='pack',
    templates='ChatTemplate load_template',
    parts='Aux load_parts Objective Part part register',
    self_attention='Attention causal dense_mask scaled_dot_product',
    gpt='Block check_causal GPTConfig MiniGPT MLP',
    train='adamw batches fit next_token_loss plot_loss train_step TrainState',
    package='find_model load load_or_train save',
    evaluation='compare evaluate Score score',
    sampling='sample stream',
    looking='attention_map attention_maps attention_of hidden_states logit_lens plot_attention',
    optim='muon',
    positions='RoPE',
    llama_block='llama ParallelBlock QKNorm RMSNorm SandwichBlock SwiGLU',
    gqa='GQA to_gqa',
    kv_cache='complete KVCache sliding_window with_kv_cache',
    inference='for_inference',
    sparse='attention_sinks same_document',
    kernels='SparseAttention',
    moe='MoE Router',
    lora='add_lora merge_lora',
    diffusion='diffusion_llama fill_blanks infill MaskedDiffusion',
    chat='add_marks',
    reward='DPO grpo',
    conversations='Chat',
    hub='from_hf to_hf',
    runs='train_run',
    play='chat_window playground',
    first_tour='tour',
)
_HOME = {name: module for module, names in _ROOT.items() for name in names.split()}

TYPE_CHECKING = False  # a type checker takes it for True, and so knows what each name is
if TYPE_CHECKING:
    from .core import check as check, home as home, LabError as LabError
    from .hardware import device as device
    from .corpora import Corpus as Corpus, load_corpus as load_corpus
    from .config import read_config as read_config, RunConfig as RunConfig
    from .chars import (
        CharTokenizer as CharTokenizer,
        load_tokenizer as load_tokenizer,
        Tokenizer as Tokenizer,
    )
    from .bpe import BPETokenizer as BPETokenizer
    from .tales import tiny_tales as tiny_tales
    from .batching import BatchStream as BatchStream
    from .packing import pack as pack
    from .templates import ChatTemplate as ChatTemplate, load_template as load_template
    from .parts import (
        Aux as Aux,
        load_parts as load_parts,
        Objective as Objective,
        Part as Part,
        part as part,
        register as register,
    )
    from .self_attention import (
        Attention as Attention,
        causal as causal,
        dense_mask as dense_mask,
        scaled_dot_product as scaled_dot_product,
    )
    from .gpt import (
        Block as Block,
        check_causal as check_causal,
        GPTConfig as GPTConfig,
        MiniGPT as MiniGPT,
        MLP as MLP,
    )
    from .train import (
        adamw as adamw,
        batches as batches,
        fit as fit,
        next_token_loss as next_token_loss,
        plot_loss as plot_loss,
        train_step as train_step,
        TrainState as TrainState,
    )
    from .package import (
        find_model as find_model,
        load as load,
        load_or_train as load_or_train,
        save as save,
    )
    from .evaluation import compare as compare, evaluate as evaluate, Score as Score, score as score
    from .sampling import sample as sample, stream as stream
    from .looking import (
        attention_map as attention_map,
        attention_maps as attention_maps,
        attention_of as attention_of,
        hidden_states as hidden_states,
        logit_lens as logit_lens,
        plot_attention as plot_attention,
    )
    from .optim import muon as muon
    from .positions import RoPE as RoPE
    from .llama_block import (
        llama as llama,
        ParallelBlock as ParallelBlock,
        QKNorm as QKNorm,
        RMSNorm as RMSNorm,
        SandwichBlock as SandwichBlock,
        SwiGLU as SwiGLU,
    )
    from .gqa import GQA as GQA, to_gqa as to_gqa
    from .kv_cache import (
        complete as complete,
        KVCache as KVCache,
        sliding_window as sliding_window,
        with_kv_cache as with_kv_cache,
    )
    from .inference import for_inference as for_inference
    from .sparse import attention_sinks as attention_sinks, same_document as same_document
    from .kernels import SparseAttention as SparseAttention
    from .moe import MoE as MoE, Router as Router
    from .lora import add_lora as add_lora, merge_lora as merge_lora
    from .diffusion import (
        diffusion_llama as diffusion_llama,
        fill_blanks as fill_blanks,
        infill as infill,
        MaskedDiffusion as MaskedDiffusion,
    )
    from .chat import add_marks as add_marks
    from .reward import DPO as DPO, grpo as grpo
    from .conversations import Chat as Chat
    from .hub import from_hf as from_hf, to_hf as to_hf
    from .runs import train_run as train_run
    from .play import chat_window as chat_window, playground as playground
    from .first_tour import tour as tour


if not TYPE_CHECKING:  # or it would take any name for one of these

    def __getattr__(name):
        "Called for a name that is not here yet: imports it from its chapter, and keeps it"
        from importlib import import_module

        if name not in _HOME:
            from difflib import get_close_matches

            near = get_close_matches(name, _HOME, 1)
            remedy = f': did you mean {near[0]!r}?' if near else ''
            raise AttributeError(f'llm_lab has no {name!r}{remedy}', name=name, obj=None)
        value = getattr(import_module(f'.{_HOME[name]}', __name__), name)
        globals()[name] = value
        return value


def __dir__():
    return sorted({*globals(), *_HOME})
