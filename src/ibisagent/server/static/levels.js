// Level and width: of an image over its 256 grey levels, of a scan over its values.

import { $, app, make, report, say, stage } from "/static/app.js";
import { showSlice } from "/static/scan.js";

const IMAGE = { full: [127.5, 255], dark: [64, 128], middle: [128, 128], bright: [192, 128] };
const input = $("window").querySelector("input"), list = $("windows");

let base = null; // while they are dragged: what they were

const named = () => (app.scan ? app.scan.windows : IMAGE);

function read() {
  const [, level, width] = input.value.match(/^\s*([+-]?[\d.]+)\s*\/\s*([\d.]+)\s*$/) || [];
  return width > 0 ? [Number(level), Number(width)] : named()[input.value.trim()];
}

// As close as what is loaded allows: a scan's slice is drawn anew by the server in the end.
function show([level, width], [from, span]) {
  const grey = (value) => (255 * (value - (from - span / 2))) / span;
  stage.setLevels(grey(level - width / 2), grey(level + width / 2));
}

// text: LEVEL/WIDTH, or a name. fetched: whether a scan's slice is to be asked for.
export function set(text, fetched = true) {
  input.value = text;
  const wanted = read();
  if (!wanted) return say("Give LEVEL/WIDTH, such as 40/400, or choose one.", "bad");
  if (!app.scan) return show(wanted, IMAGE.full);
  app.scan.window = text.trim();
  if (fetched) showSlice(true).catch(report);
}

export function drag(dx, dy, done) {
  base ||= read() || IMAGE.full;
  const [level, width] = [base[0] + (dy * base[1]) / 300, base[1] * Math.exp(dx / 200)].map((value) => Math.round(value * 10) / 10);
  input.value = `${level}/${Math.max(1, width)}`;
  show([level, Math.max(1, width)], app.scan ? base : IMAGE.full);
  if (!done) return;
  base = null;
  set(input.value);
}

export function begin() {
  const opened = (yes) => { list.hidden = !yes; input.setAttribute("aria-expanded", yes); };
  const choose = (at) => [...list.children].forEach((one, index) => one.setAttribute("aria-selected", index === at));
  input.onclick = input.onfocus = () => {
    const option = ([name, [level, width]]) => make("li", { role: "option", onclick: () => { set(name); input.blur(); } },
      make("span", { textContent: name }), make("span", { className: "muted", textContent: `${Math.round(level)}/${Math.round(width)}` }));
    list.replaceChildren(...Object.entries(named()).map(option));
    opened(true);
  };
  list.onpointerdown = (event) => event.preventDefault();
  input.onblur = () => opened(false);
  input.onkeydown = (event) => {
    const options = [...list.children], at = options.findIndex((one) => one.ariaSelected === "true");
    const way = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (way) choose((at + way + options.length) % options.length);
    else if (event.key === "Enter" && at >= 0) options[at].click();
    else if (event.key === "Enter") { set(input.value); input.blur(); }
  };
}
