// The page: what is open, what a user does about it, and the keys for it.

import { events, get, picture, post } from "/static/api.js";
import { $, app, asked, colour, make, report, request, say, stage, target } from "/static/app.js";
import { bars, outline } from "/static/masks.js";
import * as panel from "/static/panel.js";
import { listen } from "/static/pointer.js";
import * as queue from "/static/queue.js";
import * as scan from "/static/scan.js";

const FAST = 100; // ms: slower clicks have no preview
const FULL = [127.5, 255]; // level and width of an image as it is
const ENDS = {
  stopped: "The agent says that it is done. Correct the mask, or press enter to accept it.",
  max_turns: "The agent has used its turns. Let it go on, or correct the mask yourself.",
  malformed: "The agent wrote something that cannot be read, twice. Correct the mask yourself.",
  repeated: "The agent repeats itself. Correct the mask yourself, or ask differently.",
  taken_over: "You have taken over.",
};

let opening = 0; // counts what was opened, so that what comes late is not shown
let chain = Promise.resolve(); // acts, one after another

// Opening.

async function open(item, push = true) {
  const turn = ++opening;
  Object.assign(app, { item, view: null, scan: null, targets: [], chosen: null, looking: null, covered: false });
  hover.slow = hover.known = false;
  const address = item ? `/s/${item.id}` : "/";
  if (push && location.pathname !== address) history.pushState(null, "", address);
  queue.render();
  if (!item) {
    stage.clear();
    queue.renderMine();
    panel.render();
    return say("Open an image to begin.");
  }
  if (item.kind === "scan") await scan.openScan(item);
  else {
    const [image, view] = await Promise.all([picture(`${queue.base(item)}/image`), get(queue.base(item))]);
    if (turn !== opening) return;
    stage.show(image, view.width, view.height);
    show(view);
  }
  if (turn !== opening) return;
  $("query").value = asked((app.scan || app.view).query) || $("query").value;
  setWindow(app.scan ? "auto" : "full", false);
  panel.render();
  say(summary(), item.running ? "busy" : "");
  const next = queue.beside(1);
  if (next?.kind === "image") for (const fetched of [picture(`${queue.base(next)}/image`), get(queue.base(next))]) fetched.catch(() => {});
}

const shown = (item, push) => open(item, push).catch(report);

function summary() {
  const { item, view } = app;
  if (item.running) return "The agent is at work on this image ...";
  const size = app.scan ? `${app.scan.axes.map((one) => one.count).join(" x ")} slices` : `${stage.width} x ${stage.height} pixels`;
  if (!view?.turns.length && !view?.edits.length) return `${size}. Say what to segment, or click on it.`;
  return `${app.targets.map((one) => `${one.name}: ${one.pixels.toLocaleString("en")} pixels`).join("; ") || "No mask"}. Correct it, or press enter to accept.`;
}

// What the server says of the session that is open.
function show(view) {
  Object.assign(app, { view, targets: view.targets, looking: null });
  if (app.chosen && view.target === app.chosen) app.chosen = null;
  queue.update(app.item, app.scan ? { state: "corrected", query: app.scan.query } : { ...view, running: view.running || app.item.running });
  panel.render();
}

// Acting.

// One act in the session that is open now. body: may be made once the session is known.
function act(path, body = {}, said = null) {
  const { item } = app, place = app.scan && scan.where();
  if (!item) return say("Open an image first, or take the sample.", "bad");
  const here = () => app.item === item && (!place || JSON.stringify(place) === JSON.stringify(scan.where()));
  stage.setMarks({ preview: null });
  chain = chain.then(async () => {
    const session = await sessionOf(item, place);
    if (here()) Object.assign(app, { view: session, targets: session.targets });
    const view = await post(`/v1/sessions/${session.id}/${path}`, typeof body === "function" ? body() : body);
    if (!here()) return queue.update(item, place ? { state: "corrected", query: item.query } : view);
    show(view);
    if (place) scan.countShown();
    say(said || summary());
  }).catch((error) => { report(error); panel.render(); });
  return chain;
}

// The session to act in; what was typed since it was opened counts from the first act on.
async function sessionOf(item, place) {
  if (place) return scan.sliceSession(place);
  const view = app.item === item && app.view ? app.view : await get(queue.base(item));
  const fresh = !view.turns.length && !view.edits.length && app.item === item && $("query").value.trim() && request() !== view.query;
  return fresh ? post(`${queue.base(item)}/query`, { query: request() }) : view;
}

async function run(turns) {
  const { item } = app, place = app.scan && scan.where();
  if (!item) return say("Open an image first, or take the sample.", "bad");
  if (item.running || app.view?.running) return app.view && act("take-over", {}, "You have taken over: click, or let the agent work again.");
  if (!$("query").value.trim()) {
    $("query").focus();
    return say("Say what is to be segmented first.", "bad");
  }
  const here = () => app.item === item && (!place || JSON.stringify(place) === JSON.stringify(scan.where()));
  item.running = true;
  say("The agent is thinking ...", "busy");
  queue.askedFor(request());
  try {
    const { id } = await sessionOf(item, place);
    panel.render();
    for await (const [name, data] of events(`/v1/sessions/${id}/run/stream`, { query: request(), ...(turns ? { max_turns: turns } : {}) })) {
      if (name === "error") throw new Error(data.detail);
      if (name === "end") item.running = false;
      const view = name === "end" ? data.session : await get(`/v1/sessions/${id}`);
      if (here()) show(view);
      else queue.update(item, view);
      if (name === "end" && here()) say(turns && data.ended === "max_turns" ? summary() : ENDS[data.ended]);
    }
    if (place) scan.countShown();
    else if (item.state === "agent") queue.judge(item).catch(report);
  } catch (error) {
    report(error);
  } finally {
    item.running = false;
    queue.render();
    panel.render();
    queue.workAhead();
  }
}

async function accept() {
  const { item } = app;
  if (!item) return;
  if (app.scan) await scan.acceptScan().then(panel.render).catch(report);
  else await act("accept", {}, `${item.name} is accepted.`);
  if (item.state !== "accepted" || app.item !== item) return;
  const next = queue.nextToDo();
  if (next) await shown(next);
  else say("All images are accepted. Export the masks above.");
}

async function look(turn) {
  if (app.looking === turn) return back();
  app.targets = await get(`/v1/sessions/${app.view.id}/masks?turn=${turn}`);
  app.looking = turn;
  panel.render();
  say(`The masks as they were after turn ${turn}.`);
}

function back() {
  Object.assign(app, { looking: null, targets: app.view.targets });
  panel.render();
}

async function fork() {
  const view = await post(`/v1/sessions/${app.view.id}/fork`, { turn: app.looking });
  await queue.load();
  await open(app.items.find((item) => item.id === view.id));
  say("A new session that begins as it was then. The old one is still there.");
}

// What pointers and keys do.

const acts = {
  tool: () => app.tool,
  radius: () => Number($("radius").value),
  colour: () => colour(target()),
  click: (x, y, positive) => act("click", () => ({ x, y, positive, target: target() })),
  box({ x0, y0, x1, y1 }, edited) {
    if (edited) act("undo");
    act("box", () => ({ x0, y0, x1, y1, target: edited?.target || target() }));
  },
  brush(points, radius, add) {
    const rounded = points.map((point) => point.map((value) => Math.round(value * 100) / 100));
    act("brush", () => ({ points: rounded, radius, add, target: target() }));
  },
  hover,
  levels(dx, dy, done) {
    const [level, width] = acts.dragged ||= levels();
    const wanted = [level + (dy * width) / 300, Math.max(1, width * Math.exp(dx / 200))].map((value) => Math.round(value * 10) / 10);
    $("window").querySelector("input").value = wanted.join("/");
    showLevels(wanted);
    if (done) acts.dragged = null;
    if (done) setWindow(wanted.join("/"));
  },
  get slice() { return app.scan ? (step) => scan.goTo(app.scan.index + step) : null; },
  choose(name) { app.chosen = name; panel.render(); },
  remove: (name) => act("remove", { target: name }, `${name} is removed; undo brings it back.`),
  rename: (name, other) => act("rename", { target: name, name: other }, `${name} is now called ${other}.`),
  look: (turn) => look(turn).catch(report),
};

// The outline that a click here would give, where the server is fast enough.
async function hover(place) {
  clearTimeout(hover.timer);
  hover.asked?.abort();
  const pixel = place && [Math.floor(place.x), Math.floor(place.y)].join();
  if (pixel !== hover.pixel) stage.setMarks({ preview: null });
  hover.pixel = pixel;
  const can = place && app.view && !hover.slow && (app.tool === "positive" || app.tool === "negative") && app.looking === null && !app.item.running;
  if (!can) return;
  hover.timer = setTimeout(async () => {
    const { view } = app, [x, y] = pixel.split(",").map(Number), began = performance.now();
    hover.asked = new AbortController();
    const body = { x, y, positive: app.tool === "positive", target: target() };
    const found = await post(`/v1/sessions/${view.id}/preview`, body, hover.asked.signal).catch(() => null);
    if (!found) return;
    hover.slow = hover.known && performance.now() - began > FAST; // the first one opens the image
    hover.known = true;
    if (hover.pixel === pixel && app.view === view) stage.setMarks({ preview: { path: outline(bars(found.mask)), colour: colour(found.name) } });
  }, 40);
}

// Level and width.

function levels() {
  const text = $("window").querySelector("input").value;
  const [, level, width] = text.match(/^\s*([+-]?[\d.]+)\s*\/\s*([\d.]+)\s*$/) || [];
  return width > 0 ? [Number(level), Number(width)] : app.scan?.windows[text] || (text === "full" || app.scan ? FULL : null);
}

// As close as what is loaded allows: a scan's slice is drawn anew when it has been asked for.
function showLevels([level, width]) {
  const [base, span] = app.scan ? acts.dragged || levels() : FULL;
  const grey = (value) => (255 * (value - (base - span / 2))) / span;
  stage.setLevels(grey(level - width / 2), grey(level + width / 2));
}

function setWindow(text, fetched = true) {
  $("window").querySelector("input").value = text;
  $("windows").hidden = true;
  const wanted = levels();
  if (!wanted) return say("Give LEVEL/WIDTH, such as 40/400, or choose one.", "bad");
  if (!app.scan) return showLevels(wanted);
  app.scan.window = text;
  if (fetched) scan.showSlice(true).catch(report);
}

function beginWindow() {
  const input = $("window").querySelector("input"), list = $("windows");
  const opened = (yes) => { list.hidden = !yes; input.setAttribute("aria-expanded", yes); };
  const choices = () => Object.entries(app.scan ? app.scan.windows : { full: FULL, dark: [64, 128], bright: [192, 128], middle: [128, 128] });
  input.onclick = input.onfocus = () => {
    list.replaceChildren(...choices().map(([name, [level, width]]) => make("li", { role: "option", onclick: () => setWindow(name in FULL ? name : app.scan ? name : name === "full" ? name : `${level}/${width}`) },
      make("span", { textContent: name }), make("span", { className: "muted", textContent: `${Math.round(level)}/${Math.round(width)}` }))));
    opened(true);
  };
  list.onpointerdown = (event) => event.preventDefault();
  input.onblur = () => opened(false);
  input.onkeydown = (event) => {
    const options = [...list.children], at = options.findIndex((one) => one.ariaSelected === "true");
    if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      options[at] && (options[at].ariaSelected = "false");
      const next = options[(at + (event.key === "ArrowDown" ? 1 : options.length - 1) + options.length) % options.length];
      if (next) next.ariaSelected = "true";
    } else if (event.key === "Enter") (options[at] && !list.hidden ? options[at].click() : setWindow(input.value.trim()));
    if (event.key === "Escape" || event.key === "Enter") input.blur();
  };
}

// Keys.

const tool = (name) => () => { app.tool = name; panel.render(); };
const range = (id, step) => () => { $(id).value = Number($(id).value) + step; $(id).dispatchEvent(new Event("input")); };
const KEYS = {
  p: ["positive click", tool("positive")], n: ["negative click (also the right button)", tool("negative")],
  b: ["box; drag its corners to change it", tool("box")], d: ["brush", tool("brush")], e: ["eraser", tool("eraser")],
  l: ["level and width by dragging", tool("levels")], m: ["move (also shift or middle button)", tool("move")],
  u: ["undo (also ctrl z)", () => act("undo")], r: ["redo (also ctrl y)", () => act("redo")],
  " ": ["run, or take over", () => run()], t: ["one turn of the agent", () => run(1)],
  Enter: ["accept and next", accept], ",": ["previous image", () => step(-1)], ".": ["next image", () => step(1)],
  "[": ["less opacity", range("opacity", -10)], "]": ["more opacity", range("opacity", 10)],
  "{": ["smaller brush", range("radius", -2)], "}": ["larger brush", range("radius", 2)],
  h: ["hide the masks while held", () => { app.covered = true; panel.showMasks(); }],
  F2: ["rename the object", () => panel.renameChosen()], Delete: ["remove the object", () => acts.remove(target())],
  "+": ["closer", () => stage.zoom(1.25)], "-": ["farther", () => stage.zoom(0.8)], 0: ["whole image", () => stage.fit()],
  PageUp: ["slice before", () => acts.slice?.(-1)], PageDown: ["slice after", () => acts.slice?.(1)],
  g: ["carry the masks on from this slice", () => app.scan && scan.propagate()],
  x: ["act at the cross that the arrow keys move", place], o: ["open files", () => $("file").firstElementChild.click()],
  "?": ["these keys", () => $("keys").showModal()],
};

function step(by) {
  const next = queue.beside(by);
  if (next) shown(next);
  else say(by > 0 ? "This is the last one." : "This is the first one.");
}

// A cross for the keyboard: x clicks there; of a box it sets the two corners.
function place() {
  const { cross, corner } = stage;
  if (!cross) return moveCross(0, 0);
  if (app.tool === "box" && !corner) {
    stage.setMarks({ corner: cross });
    return say("Now move to the opposite corner, and press x again.");
  }
  stage.setMarks({ corner: null });
  if (app.tool === "box") acts.box({ x0: Math.min(cross.x, corner.x), y0: Math.min(cross.y, corner.y), x1: Math.max(cross.x, corner.x) + 1, y1: Math.max(cross.y, corner.y) + 1 });
  else if (app.tool === "brush" || app.tool === "eraser") acts.brush([[cross.x + 0.5, cross.y + 0.5]], acts.radius(), app.tool === "brush");
  else acts.click(cross.x, cross.y, app.tool !== "negative");
}

function moveCross(dx, dy) {
  if (!stage.width) return;
  const { x, y } = stage.cross || { x: Math.floor(stage.width / 2), y: Math.floor(stage.height / 2) };
  const within = (value, most) => Math.max(0, Math.min(most - 1, value));
  stage.setMarks({ cross: { x: within(x + dx, stage.width), y: within(y + dy, stage.height) } });
  stage.reveal(stage.cross);
  say(`x ${stage.cross.x}, y ${stage.cross.y}; press x to act there.`);
}

addEventListener("keydown", (event) => {
  const at = event.target, control = event.ctrlKey || event.metaKey, key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.altKey || $("keys").open || at.matches("input[type=text], .combo input, select, textarea")) {
    return event.key === "Escape" && at.blur();
  }
  const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  let done = KEYS[key]?.[1];
  if (control) done = key === "z" ? KEYS[event.shiftKey ? "r" : "u"][1] : key === "y" ? KEYS.r[1] : null;
  else if ((key === " " || key === "Enter") && at.matches("button, a, summary, input, label")) done = null;
  else if (/^[1-8]$/.test(key)) done = () => $("objects").children[key - 1]?.querySelector(".name").click();
  else if (arrow && at.id === "picture") done = () => moveCross(...arrow.map((way) => way * (event.shiftKey ? 10 : 1)));
  else if (event.key === "Escape") done = () => { stage.setMarks({ cross: null, corner: null }); if (app.looking !== null) back(); };
  if (!done || (event.repeat && (key === "Enter" || key === " "))) return;
  event.preventDefault();
  Promise.resolve(done()).catch(report);
});
addEventListener("keyup", (event) => {
  if (event.key === "h" && app.covered) { app.covered = false; panel.showMasks(); }
});

// Beginning.

function wire() {
  const on = (id, act) => { $(id).onclick = () => Promise.resolve(act()).catch(report); };
  on("sample", queue.openSample); on("turn", () => run(1)); on("undo", KEYS.u[1]); on("redo", KEYS.r[1]); on("fit", () => stage.fit());
  on("previous", () => step(-1)); on("next", () => step(1)); on("accept", accept); on("reset", () => act("reset", {}, "Back at the beginning; redo brings everything back."));
  on("delete", () => queue.remove(app.item)); on("back", back); on("fork", fork); on("help", KEYS["?"][1]);
  $("home").onclick = (event) => { event.preventDefault(); queue.load().then(() => shown(null)); };
  $("ask").onsubmit = (event) => { event.preventDefault(); if (document.activeElement === $("query")) $("picture").focus(); run(); };
  $("new-object").onsubmit = (event) => { event.preventDefault(); const name = $("target").value.trim(); $("target").value = ""; if (name && app.item) acts.choose(name); };
  for (const button of document.querySelectorAll("[data-tool]")) button.onclick = tool(button.dataset.tool);
  $("opacity").oninput = () => { stage.setOpacity(Number($("opacity").value) / 100); localStorage.setItem("opacity", $("opacity").value); };
  $("radius").oninput = () => { $("radius-value").value = $("radius").value; if (stage.cursor) stage.setMarks({ cursor: { ...stage.cursor, radius: acts.radius() } }); };
  $("marks").onchange = panel.showMasks;
  $("opacity").value = localStorage.getItem("opacity") || 40;
  $("radius").value = 8;
  for (const id of ["opacity", "radius"]) $(id).dispatchEvent(new Event("input"));
  for (const id of ["file", "folder"]) $(id).onkeydown = (event) => { if (event.key === "Enter" || event.key === " ") $(id).firstElementChild.click(); };
  $("keys").querySelector("dl").append(...Object.entries(KEYS).flatMap(([key, [what]]) => [make("dt", { textContent: key === " " ? "space" : key }), make("dd", { textContent: what })]),
    make("dt", { textContent: "1-8" }), make("dd", { textContent: "choose an object" }));
  addEventListener("click", (event) => { // back to the image, so that keys count there
    if (event.detail && event.target.closest("button, .check, select") && !event.target.closest("dialog, form, #objects input") && app.item) $("picture").focus({ preventScroll: true });
    if (!event.target.closest("#export")) $("export").open = false;
  });
  addEventListener("popstate", route);
}

async function route() {
  const [, id] = location.pathname.match(/^\/s\/(\w+)$/) || [];
  const item = app.items.find((one) => one.id === id);
  await shown(item || null, false);
  if (id && !item) say("What this address leads to is not here (any more), or belongs to another browser.", "bad");
}

async function begin() {
  queue.begin(shown, (view) => { show(view); say(summary()); });
  scan.begin(panel.render);
  panel.begin(acts);
  listen(stage, acts);
  beginWindow();
  wire();
  const [models] = await Promise.all([get("/v1/models"), queue.load()]);
  app.limits = models.limits;
  await route();
  queue.workAhead();
}

begin().catch(report);
