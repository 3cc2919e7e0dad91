'use strict';

const $ = (id) => document.getElementById(id);
let model = null;
let running = null;

function headers() {
  const key = $('key').value.trim();
  const json = { 'content-type': 'application/json' };
  return key ? { ...json, authorization: `Bearer ${key}` } : json;
}

async function connect() {
  const answer = await fetch('v1/models', { headers: headers() });
  const body = await answer.json();
  if (!answer.ok) {
    $('key-box').open = answer.status === 401;
    throw new Error(body.error.message);
  }
  model = body.data[0];
  const layers = model.layers;
  $('model').textContent =
    `${model.id} · ${layers.at(-1)} layers, exits at ${layers.slice(0, -1).join(', ') || 'none'}`;
  $('max-tokens').max = model.context - 1;
  $('thinkers').max = model.max_thinkers;
  showStrategies();
  showControls();
  showLegend([]);
}

// A threshold that the slider cannot show is left to the server, by a request that names none.
function showStrategies() {
  const names = model.strategies.map((name) => new Option(name, name));
  const ofServer = model.threshold !== null && typeof model.threshold !== 'number';
  if (ofServer) names.unshift(new Option(`as served (${model.threshold})`, ''));
  $('strategy').replaceChildren(...names);
  if (ofServer) return;
  $('strategy').value = model.strategies.includes('deferred') ? 'deferred' : model.default_strategy;
  if (model.threshold !== null) $('threshold').value = model.threshold;
}

function thinkers() {
  return Number($('thinkers').value) || 1;
}

function showControls() {
  const exits = $('strategy').value === 'deferred';
  const alone = thinkers() === 1;
  $('answer-tokens').disabled = alone;
  $('answer-label').classList.toggle('off', alone);
  $('threshold').disabled = !exits;
  $('threshold-label').classList.toggle('off', !exits);
  $('threshold-value').textContent = Number($('threshold').value).toFixed(2);
  $('temperature-value').textContent = Number($('temperature').value).toFixed(2);
}

// From 0, the shallowest exit, to 1, all layers.
function depth(layer) {
  const last = model.layers.length - 1;
  return last ? model.layers.indexOf(layer) / last : 1;
}

function coloured(tag, layer) {
  const element = document.createElement(tag);
  element.style.setProperty('--depth', depth(layer));
  return element;
}

function showLegend(seen) {
  $('legend').replaceChildren(
    ...model.layers.map((layer) => {
      const share = seen.length ? seen.filter((other) => other === layer).length / seen.length : null;
      const item = document.createElement('span');
      const count = document.createElement('b');
      count.textContent = share === null ? '' : `${Math.round(100 * share)}%`;
      const name = layer === model.layers.at(-1) ? `all ${layer} layers` : `layer ${layer}`;
      item.append(coloured('i', layer), name, count);
      return item;
    }),
  );
}

// Where the text of a choice grows: below the prompt, or in a column for each thinker, the answer last.
function placeOf(choice) {
  if (choice.thinker === undefined) return $('output');
  const id = `choice-${choice.index}`;
  if (!$(id)) {
    const column = document.createElement('article');
    const name = document.createElement('h2');
    const text = document.createElement('pre');
    name.textContent = choice.thinker === null ? 'Answer' : `Thinker ${choice.thinker}`;
    column.classList.toggle('answer', choice.thinker === null);
    column.style.order = choice.index;
    text.id = id;
    column.append(name, text);
    $('columns').append(column);
  }
  return $(id);
}

function addToken(place, piece, layer, confidence) {
  const token = coloured('span', layer);
  token.className = 'token';
  token.dataset.layer = layer;
  token.title = `${layer} of ${model.layers.at(-1)} layers, confidence ${confidence.toFixed(3)}`;
  token.textContent = piece;
  place.append(token);
  const bar = coloured('i', layer);
  bar.style.height = `${(100 * layer) / model.layers.at(-1)}%`;
  $('strip').append(bar);
}

// Calls `handle` with the object of every event until the stream ends.
async function readEvents(body, handle) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = '';
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (text + value).split('\n\n');
    text = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, '');
      if (data !== '[DONE]') handle(JSON.parse(data));
    }
  }
}

function request() {
  const alone = thinkers() === 1;
  // Thinkers do not speculate; full depth gives the same texts.
  const strategy = alone || $('strategy').value !== 'speculative' ? $('strategy').value : 'full';
  return {
    prompt: $('prompt').value,
    max_tokens: Number($('max-tokens').value),
    temperature: Number($('temperature').value),
    seed: Number($('seed').value),
    ...(strategy ? { strategy } : {}),
    ...(strategy === 'deferred' ? { threshold: Number($('threshold').value) } : {}),
    ...(alone ? {} : { thinkers: thinkers(), answer_tokens: Number($('answer-tokens').value) }),
    stream: true,
  };
}

async function generate() {
  const prompt = document.createElement('span');
  prompt.className = 'prompt';
  prompt.textContent = $('prompt').value;
  $('output').replaceChildren(prompt);
  $('columns').replaceChildren();
  $('strip').replaceChildren();
  running = new AbortController();
  const asked = request();
  const start = performance.now();
  const layers = [];
  let first = null;
  const reasons = [];
  const answer = await fetch('v1/completions', {
    method: 'POST',
    headers: headers(),
    body: JSON.stringify(asked),
    signal: running.signal,
  });
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  await readEvents(answer.body, (event) => {
    if (event.error) throw new Error(event.error.message);
    for (const choice of event.choices) {
      first ??= performance.now();
      const place = placeOf(choice);
      choice.pieces.forEach((piece, i) => {
        addToken(place, piece, choice.exit_layers[i], choice.confidences[i]);
        layers.push(choice.exit_layers[i]);
      });
      if (choice.finish_reason) reasons[choice.index] = choice.finish_reason;
    }
    showLegend(layers);
    const seconds = (performance.now() - start) / 1000;
    const mean = layers.reduce((sum, layer) => sum + layer, 0) / Math.max(layers.length, 1);
    $('status').textContent =
      `${layers.length} tokens · ${(layers.length / seconds).toFixed(0)} per second · ` +
      `first after ${Math.round(first - start)} ms · ` +
      `${mean.toFixed(2)} of ${model.layers.at(-1)} layers per token` +
      (asked.thinkers || !reasons.length ? '' : ` · done (${reasons[0]})`);
  });
  if (asked.thinkers) $('status').textContent += ` · done (${reasons.join(', ')})`;
}

function fail(error) {
  if (error.name === 'AbortError') {
    $('status').textContent += ' · stopped';
    return;
  }
  $('status').className = 'error';
  $('status').textContent = error.message;
}

async function submit() {
  if (running) {
    running.abort();
    return;
  }
  $('status').className = '';
  $('status').textContent = 'waiting for the first token…';
  $('go').textContent = 'Stop';
  $('go').classList.add('running');
  try {
    if (!model) await connect();
    await generate();
  } catch (error) {
    fail(error);
  } finally {
    running = null;
    $('go').textContent = 'Generate';
    $('go').classList.remove('running');
  }
}

$('form').addEventListener('submit', (event) => {
  event.preventDefault();
  submit();
});
$('form').addEventListener('input', () => model && showControls());
connect().catch(fail);
