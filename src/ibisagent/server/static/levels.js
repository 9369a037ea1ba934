// Level and width: of an image over its 256 grey levels, of a scan over its values.

import { $, app, make, report, say, stage } from "/static/app.js";
import { showSlice } from "/static/scan.js";

const IMAGE = { full: [127.5, 255], dark: [64, 128], middle: [128, 128], bright: [192, 128] };
const [input, named] = $("window").children;
for (const field of [input, named]) field.onchange = () => { set(field.value); $("image").focus(); };

let base = null; // while they are dragged: what they were

const windows = () => (app.scan ? app.scan.windows : IMAGE);

function read() {
  const [, level, width] = input.value.match(/^\s*([+-]?[\d.]+)\s*\/\s*([\d.]+)\s*$/) || [];
  return width > 0 ? [Number(level), Number(width)] : windows()[input.value.trim()];
}

// As close as what is loaded allows: a scan's slice is drawn anew by the server in the end.
function show([level, width], [from, span]) {
  const grey = (value) => (255 * (value - (from - span / 2))) / span;
  stage.setLevels(grey(level - width / 2), grey(level + width / 2));
}

// text: LEVEL/WIDTH, or a name. fetched: whether a scan's slice is to be asked for.
export function set(text, fetched = true) {
  const option = ([name, window]) => make("option", { value: name, textContent: `${name} ${window.map(Math.round).join("/")}` });
  named.replaceChildren(...Object.entries(windows()).map(option));
  named.value = input.value = text.trim();
  const wanted = read();
  if (!wanted) return say("Give LEVEL/WIDTH, such as 40/400, or choose one.", "bad");
  if (!app.scan) return show(wanted, IMAGE.full);
  app.scan.window = input.value;
  if (fetched) showSlice(true).catch(report);
}

export function drag(dx, dy, done) {
  base ||= read() || IMAGE.full;
  const [level, width] = [base[0] + (dy * base[1]) / 300, Math.max(1, base[1] * Math.exp(dx / 200))].map((value) => Math.round(value * 10) / 10);
  input.value = `${level}/${width}`;
  show([level, width], app.scan ? base : IMAGE.full);
  if (!done) return;
  base = null;
  set(input.value);
}
