// The view of receptive fields in `sparse`: who reads whom as a graph, and the mask of each layer.
//
// The model is what Python shares: `size` (tokens), `layers`, `data` (the masks, a byte for each
// layer, query and key), and the token that is chosen: `query`.

const INK = [26, 95, 180];
const WIDTH = 600; // of the graph, in its own units
const STOREY = 46; // from layer to layer
const EDGE = 12; // above the last layer, and below the first
const LINE = { stroke: 'currentColor', 'stroke-width': 0.6, opacity: 0.5 };

const makeSvg = (tag, attributes, into) => {
  const made = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return into.appendChild(made);
};

// From the query down: mark the tokens of its receptive field, draw a line to each key that those
// read, and go on one layer below; returns how many tokens the field holds after each layer
const draw = (svg, model, query) => {
  const T = model.get('size');
  const L = model.get('layers');
  const data = model.get('data');
  const step = WIDTH / T;
  const x = token => step * (token + 0.5);
  const y = layer => EDGE + STOREY * (L - layer);
  const counts = [];
  let now = new Set([query]);

  svg.replaceChildren();
  svg.setAttribute('viewBox', `0 0 ${WIDTH} ${STOREY * L + 2 * EDGE}`);
  for (let layer = L; layer >= 0; layer--) {
    const next = new Set(now); // the stream keeps itself
    const reads = (i, j) => layer > 0 && data.getUint8(((layer - 1) * T + i) * T + j);
    for (const i of now) {
      for (let j = 0; j < T; j++) {
        if (!reads(i, j)) continue;
        next.add(j);
        const ends = { x1: x(i), y1: y(layer), x2: x(j), y2: y(layer - 1) };
        makeSvg('line', { ...ends, ...LINE }, svg);
      }
    }
    for (let t = 0; t < T; t++) {
      const fill = now.has(t) ? `rgb(${INK})` : '#8885';
      makeSvg('circle', { cx: x(t), cy: y(layer), r: Math.min(5, step / 2.4), fill }, svg);
    }
    if (layer < L) counts.push(now.size);
    now = next;
  }
  return counts;
};

const make = (tag, name, into) => {
  const made = document.createElement(tag);
  made.className = 'reach' + name;
  return into.appendChild(made);
};

const render = ({ model, el }) => {
  const T = model.get('size');
  const L = model.get('layers');
  const data = model.get('data');
  const choose = query => {
    model.set('query', query);
    model.save_changes();
  };

  // ---- on the left the graph, a button for each token, and the words

  const box = make('div', '', el);
  box.style.setProperty('--ink', INK.join());
  const graph = make('div', '-graph', box);
  const svg = makeSvg('svg', { role: 'img' }, graph);
  svg.onclick = event => {
    const { left, width } = svg.getBoundingClientRect();
    const token = Math.floor((T * (event.clientX - left)) / width);
    choose(Math.min(Math.max(token, 0), T - 1));
  };
  const bar = make('div', '-bar', graph);
  const buttons = Array.from({ length: T }, (_, token) => {
    const button = make('button', '-token', bar);
    button.textContent = token;
    button.ariaLabel = `token ${token}`;
    button.onclick = () => choose(token);
    return button;
  });
  const words = make('div', '-words', graph);
  words.ariaLive = 'polite';

  // ---- on the right the masks, a pixel for each query and key, a frame around the query's row

  const masks = make('div', '-masks', box);
  const rows = Array.from({ length: L }, (_, layer) => {
    const mask = make('div', '-mask', masks);
    mask.title = `layer ${layer}`;
    const canvas = make('canvas', '-map', mask);
    canvas.width = T;
    canvas.height = T;
    const image = new ImageData(T, T);
    for (let n = 0; n < T * T; n++) {
      const read = data.getUint8(layer * T * T + n);
      image.data.set([...INK, 230 * read], 4 * n);
    }
    canvas.getContext('2d').putImageData(image, 0, 0);
    return make('i', '-row', mask);
  });

  // ---- draw what is chosen, now and after each change

  const show = () => {
    const query = model.get('query');
    const counts = draw(svg, model, query).join(', ');
    // the same words as `describe_receptive_field` of `sparse`
    const said = `token ${query} has ${counts} of ${query + 1} tokens in its receptive field`;
    words.textContent = `${said} after ${L} layers`;
    svg.setAttribute('aria-label', words.textContent);
    buttons.forEach((button, token) => button.setAttribute('aria-pressed', token === query));
    rows.forEach(row => {
      row.style.top = `${(100 * query) / T}%`;
      row.style.height = `${100 / T}%`;
    });
  };
  model.on('change:query', show);
  show();
  return () => model.off('change:query', show);
};

export default { render };
