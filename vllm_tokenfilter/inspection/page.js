"use strict";
// Draws the maps from the data beside it and moves one cursor through text and maps. Everything it tells is also in the tables.
const data = JSON.parse(document.getElementById("data").textContent);
const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
const states = bytes(data.states);
const similar = { key: new Int8Array(bytes(data.key).buffer), value: new Int8Array(bytes(data.value).buffer) };
const count = data.tokens, rows = data.layers.length, filtered = data.filtered;
const ids = ["text", "told", "layer", "map", "lines", "cost"];
const [text, told, choice, map, lines, cost] = ids.map((id) => document.getElementById(id));
const spans = [...text.children];
let cursor = 0;

const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const row = () => (choice.value === "all" ? -1 : Number(choice.value));
const percent = (x) => (100 * x).toFixed(x < 0.1 ? 2 : 1) + " %";

function overLayers(value) {
  let sum = 0;
  for (let i = 0; i < rows; i++) sum += value(i);
  return sum;
}

function similarity(of, token) {
  const at = (i) => similar[of][i * count + token] / 127;
  return row() >= 0 ? at(row()) : overLayers(at) / rows;
}

const prunedIn = (token) => overLayers((i) => states[i * count + token] === 0);

function shade() {
  spans.forEach((span, token) => {
    const one = row();
    const part = one >= 0 ? Number(states[one * count + token] === 0) : prunedIn(token) / Math.max(filtered, 1);
    span.style.setProperty("--p", part.toFixed(3));
    span.classList.toggle("h", part >= 0.75);
    span.classList.toggle("m", part >= 0.5 && part < 0.75);
  });
}

function canvas(element, height) {
  const scale = window.devicePixelRatio || 1, width = element.clientWidth;
  element.width = Math.round(width * scale);
  element.height = Math.round(height * scale);
  element.style.height = height + "px";
  const pen = element.getContext("2d");
  pen.scale(scale, scale);
  Object.assign(pen, { font: "12px system-ui, sans-serif", textAlign: "right", textBaseline: "middle" });
  return [pen, width];
}

const LEFT = 44;
const across = (token, width) => LEFT + ((token + 0.5) / count) * (width - LEFT);

function marker(pen, width, height) {
  pen.fillStyle = colour("--key");
  pen.fillRect(across(cursor, width) - 0.75, 0, 1.5, height);
}

function drawMap() {
  const height = Math.max(120, rows * 8), [pen, width] = canvas(map, height);
  const small = document.createElement("canvas");
  small.width = count;
  small.height = rows;
  const ink = small.getContext("2d"), cell = ink.createImageData(count, rows);
  const paint = (name) => {
    ink.fillStyle = name;
    ink.fillRect(0, 0, 1, 1);
    return [...ink.getImageData(0, 0, 1, 1).data];
  };
  const palette = [paint(`rgb(${colour("--heat")})`), paint(colour("--paper")), paint(colour("--raw"))];
  for (let i = 0; i < states.length; i++) cell.data.set(palette[states[i]], 4 * i);
  ink.putImageData(cell, 0, 0);
  pen.imageSmoothingEnabled = count > width;
  pen.imageSmoothingQuality = "high";
  pen.drawImage(small, LEFT, 0, width - LEFT, height);
  pen.fillStyle = colour("--faint");
  const every = Math.ceil(rows / 12);
  for (let i = 0; i < rows; i += every) pen.fillText(data.layers[i], LEFT - 6, Math.max(((i + 0.5) / rows) * height, 7));
  if (row() >= 0) {
    pen.strokeStyle = colour("--key");
    pen.lineWidth = 2;
    pen.strokeRect(LEFT, (row() / rows) * height, width - LEFT - 1, height / rows);
  }
  marker(pen, width, height);
}

function curve(pen, width, height, low, high, at, name, dash) {
  // One point a pixel column: the mean of its tokens.
  const columns = Math.min(count, Math.max(1, Math.floor(width - LEFT)));
  pen.strokeStyle = colour(name);
  pen.setLineDash(dash);
  pen.lineWidth = 1.25;
  pen.beginPath();
  for (let c = 0; c < columns; c++) {
    const from = Math.floor((c * count) / columns), to = Math.max(from + 1, Math.floor(((c + 1) * count) / columns));
    let sum = 0;
    for (let token = from; token < to; token++) sum += at(token);
    const y = height - ((sum / (to - from) - low) / (high - low)) * height;
    pen.lineTo(LEFT + ((c + 0.5) / columns) * (width - LEFT), y);
  }
  pen.stroke();
  pen.setLineDash([]);
}

function scale(pen, width, height, low, high) {
  for (const value of [low, (low + high) / 2, high]) {
    const y = height - ((value - low) / (high - low)) * height;
    pen.fillStyle = colour("--faint");
    pen.fillText(value.toFixed(2), LEFT - 6, Math.min(Math.max(y, 8), height - 8));
    pen.fillStyle = colour("--line");
    pen.fillRect(LEFT, y - 0.5, width - LEFT, 1);
  }
}

function drawLines() {
  const height = 150, [pen, width] = canvas(lines, height);
  let low = 1;
  for (let token = 1; token < count; token++) low = Math.min(low, similarity("key", token), similarity("value", token));
  low = Math.floor(low * 4) / 4;
  scale(pen, width, height, low, 1);
  curve(pen, width, height, low, 1, (t) => similarity("key", Math.max(t, 1)), "--key", []);
  curve(pen, width, height, low, 1, (t) => similarity("value", Math.max(t, 1)), "--value", [5, 2]);
  marker(pen, width, height);
}

function drawCost() {
  const height = 130, [pen, width] = canvas(cost, height), middle = height / 2;
  let most = 0.05;
  for (let t = 0; t < count - 1; t++) most = Math.max(most, Math.abs(data.after[t] - data.before[t]));
  scale(pen, width, height, -most, most);
  for (let t = 0; t < count - 1; t++) {
    const change = data.after[t] - data.before[t];
    pen.fillStyle = colour(change < 0 ? "--cost" : "--gain");
    const tall = (Math.abs(change) / most) * middle;
    pen.fillRect(across(t, width) - 0.5, change < 0 ? middle : middle - tall, Math.max(1, (width - LEFT) / count), tall);
  }
  marker(pen, width, height);
}

function draw() {
  drawMap();
  drawLines();
  drawCost();
}

function tell() {
  const piece = spans[cursor].textContent, one = row(), state = one >= 0 ? states[one * count + cursor] : -1;
  const words = ["pruned", "kept", "whole"];
  const where = one >= 0 ? `${words[state]} in layer ${data.layers[one]}` : `pruned by ${prunedIn(cursor)} of ${filtered} filtered layers`;
  let line = `Token ${cursor} ${JSON.stringify(piece)}: ${where}; key similarity ${similarity("key", cursor).toFixed(2)}, `;
  line += `value ${similarity("value", cursor).toFixed(2)}. `;
  if (cursor < count - 1) {
    const next = JSON.stringify(spans[cursor + 1].textContent);
    line += `Next ${next}: ${percent(data.before[cursor])} dense, ${percent(data.after[cursor])} filtered.`;
  }
  told.textContent = line;
}

function go(token, scroll) {
  spans[cursor].classList.remove("at");
  spans[cursor].removeAttribute("aria-selected");
  cursor = Math.min(Math.max(token, 0), count - 1);
  spans[cursor].classList.add("at");
  spans[cursor].setAttribute("aria-selected", "true");
  text.setAttribute("aria-activedescendant", spans[cursor].id);
  if (scroll) {
    // In whole lines, so that none is cut at the top.
    const style = getComputedStyle(text), line = parseFloat(style.lineHeight);
    const above = (spans[cursor].offsetTop - text.offsetTop - text.clientHeight / 2) / line;
    text.scrollTop = above < 1 ? 0 : Math.round(above) * line + parseFloat(style.paddingTop);
  }
  tell();
  draw();
}

const STEPS = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 16, ArrowUp: -16, PageDown: data.chunk, PageUp: -data.chunk };
for (const element of [text, map, lines, cost]) {
  element.addEventListener("keydown", (event) => {
    let to = event.key in STEPS ? cursor + STEPS[event.key] : { Home: 0, End: count - 1 }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    go(to, true);
  });
}
text.addEventListener("click", (event) => {
  const token = spans.indexOf(event.target);
  if (token >= 0) go(token, false);
});
for (const element of [map, lines, cost]) {
  element.addEventListener("click", (event) => {
    const width = element.clientWidth;
    if (element === map) {
      const layer = Math.floor((event.offsetY / element.clientHeight) * rows);
      if (event.shiftKey) choice.value = String(Math.min(Math.max(layer, 0), rows - 1));
      shade();
    }
    go(Math.floor(((event.offsetX - LEFT) / (width - LEFT)) * count), true);
  });
}
choice.addEventListener("change", () => { shade(); tell(); draw(); });
window.addEventListener("resize", draw);
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
const named = Number(location.hash.slice(1));
shade();
go(named > 0 ? named : 0, named > 0);
