// The attention view of `looking`: a text to touch, and below it the maps of all heads.
//
// The model is what Python shares: `tokens`, `shape` (layers, heads, tokens), `data` (all maps as
// float32, one after another), and what is chosen: `layer`, `head` and `query`.

const INK = [26, 95, 180]; // the shade; a test holds it to look.py's
const CHOICE = ['layer', 'head', 'query'];

// A token as a reader can see it
const label = token => token.replaceAll('\n', '↵').replaceAll(' ', '␣');

// The map of one head, found among the bytes of all
const read = (model, layer, head) => {
  const [, H, T] = model.get('shape');
  const data = model.get('data');
  const at = data.byteOffset + 4 * T * T * (layer * H + head);
  // a copy, because a Float32Array cannot begin at any byte
  return new Float32Array(data.buffer.slice(at, at + 4 * T * T));
};

// A pixel a weight, its strength √weight, so that small weights show
const paint = (canvas, T, weights) => {
  canvas.width = T;
  canvas.height = T;
  const image = new ImageData(T, T);
  weights.forEach((w, n) => image.data.set([...INK, 255 * Math.sqrt(w)], 4 * n));
  canvas.getContext('2d').putImageData(image, 0, 0);
};

// How many places back a head looks, as `mean_distance`
const meanDistance = (weights, T) => {
  const back = n => Math.floor(n / T) - (n % T);
  return weights.reduce((sum, w, n) => sum + w * back(n), 0) / T;
};

// Shade the text by one query's weights, and say the same in words, as `looks_at`
const show = (model, spans, words, query) => {
  const tokens = model.get('tokens');
  const T = tokens.length;
  const map = read(model, model.get('layer'), model.get('head'));
  const weights = map.subarray(T * query, T * query + T);
  spans.forEach((span, s) => {
    span.style.background = `rgba(${INK},${Math.sqrt(weights[s])})`;
    span.style.color = weights[s] > 0.36 ? '#fff' : '';
    span.setAttribute('aria-current', s === query);
    span.classList.toggle('look-later', s > query);
  });
  const best = [...weights.keys()]
    .sort((a, b) => weights[b] - weights[a])
    .slice(0, 3)
    .filter(s => weights[s] > 0);
  const say = s => `“${label(tokens[s])}”`;
  const places = best.map(s => `${say(s)} ${weights[s].toFixed(2)}`);
  words.textContent = `${say(query)} looks at ${places.join(', ')}`;
};

const make = (tag, name, text, into) => {
  const made = document.createElement(tag);
  made.className = 'look' + name;
  made.textContent = text;
  return into.appendChild(made);
};

const render = ({ model, el }) => {
  const [L, H, T] = model.get('shape');
  const choose = chosen => {
    for (const [name, n] of Object.entries(chosen)) model.set(name, n);
    model.save_changes();
  };

  // ---- a row of buttons for the layers and one for the heads, the text, the words

  const box = make('div', '', '', el);
  box.style.setProperty('--ink', INK.join());
  const makeKnobs = (name, count) => {
    const bar = make('div', '-bar', name, box);
    return Array.from({ length: count }, (_, n) => {
      const knob = make('button', '-knob', n, bar);
      knob.ariaLabel = `${name} ${n}`;
      knob.onclick = () => choose({ [name]: n });
      return knob;
    });
  };
  const layerKnobs = makeKnobs('layer', L);
  const headKnobs = makeKnobs('head', H);
  const text = make('div', '-text', '', box);
  const words = make('div', '-words', '', box);
  words.ariaLive = 'polite';
  const help = 'Point at a token, or walk with ← and →. A click or Enter keeps it.';
  make('div', '-help', help, box);
  const spans = model.get('tokens').map(token => {
    const span = make('span', '-token', token.replaceAll('\n', '↵\n'), text);
    span.setAttribute('role', 'button');
    return span;
  });

  // ---- the maps: a small one for each head, which is a button, and the chosen one large

  const grid = make('div', '-maps', '', box);
  grid.style.gridTemplateColumns = `repeat(${H}, minmax(0, 58px))`;
  const makeThumb = (layer, head) => {
    const weights = read(model, layer, head);
    const thumb = make('button', '-thumb', '', grid);
    thumb.title = `layer ${layer}, head ${head}: ${meanDistance(weights, T).toFixed(1)} back`;
    thumb.ariaLabel = thumb.title;
    thumb.onclick = () => choose({ layer, head });
    paint(make('canvas', '-map', '', thumb), T, weights);
    return thumb;
  };
  const thumbs = Array.from({ length: L * H }, (_, n) => makeThumb(Math.floor(n / H), n % H));
  const big = make('div', '-big', '', box);
  const map = make('canvas', '-map', '', big);
  const row = make('i', '-row', '', big);

  // ---- to arrive at a token is to look; a click or Enter keeps it

  const look = s => {
    show(model, spans, words, s);
    row.style.top = `${(100 * s) / T}%`;
    row.style.height = `${100 / T}%`;
  };
  const lookAtKept = () => look(model.get('query'));

  spans.forEach((span, s) => {
    span.onmouseenter = () => look(s);
    span.onfocus = () => look(s);
    span.onclick = () => choose({ query: s });
  });
  text.onmouseleave = lookAtKept;
  text.addEventListener('focusout', lookAtKept);
  text.onkeydown = event => {
    const now = spans.indexOf(event.target);
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) {
      const next = Math.min(Math.max(now + step, 0), spans.length - 1);
      spans[next].focus();
    } else if (event.key === 'Enter' || event.key === ' ') {
      choose({ query: now });
    } else {
      return;
    }
    event.preventDefault(); // no scrolling,
    event.stopPropagation(); // and the notebook keeps its cell
  };

  // one more than the height: the mouse on the lower edge is in the last row, not below it
  const under = event => Math.floor((T * event.offsetY) / (map.clientHeight + 1));
  map.onmousemove = event => look(under(event));
  map.onclick = event => choose({ query: under(event) });
  map.onmouseleave = lookAtKept;

  // ---- draw what is chosen, now and after each change

  const draw = () => {
    const [layer, head, query] = CHOICE.map(name => model.get(name));
    const press = (button, on) => button.setAttribute('aria-pressed', on);
    lookAtKept();
    paint(map, T, read(model, layer, head));
    thumbs.forEach((thumb, n) => press(thumb, n === layer * H + head));
    layerKnobs.forEach((knob, n) => press(knob, n === layer));
    headKnobs.forEach((knob, n) => press(knob, n === head));
    // Tab stops once in the text, at the token that is kept
    spans.forEach((span, s) => {
      span.tabIndex = s === query ? 0 : -1;
    });
  };
  CHOICE.forEach(name => model.on(`change:${name}`, draw));
  draw();
  return () => CHOICE.forEach(name => model.off(`change:${name}`, draw));
};

export default { render };
