// The page: what is open, what a user does about it, and the keys for it.

import { get, fetchImage, post } from "/static/api.js";
import { $, app, asked, colour, keep, make, report, request, say, stage, stored, target } from "/static/app.js";
import * as levels from "/static/levels.js";
import { bars, outline } from "/static/masks.js";
import * as panel from "/static/panel.js";
import { listen } from "/static/pointer.js";
import * as queue from "/static/queue.js";
import * as scan from "/static/scan.js";
import { clamp } from "/static/stage.js";
import * as teach from "/static/teach.js";

const FAST = 100; // ms: slower clicks have no preview
const ENDS = {
  stopped: "The agent says that it is done. Correct the mask, or press enter to accept it.",
  max_turns: "The agent has used its turns. Let it go on, or correct the mask yourself.",
  malformed: "The agent wrote something that cannot be read, twice. Correct the mask yourself.",
  repeated: "The agent repeats itself. Correct the mask yourself, or ask differently.",
  interrupted: "You have taken over.",
};

let opening = 0; // counts what was opened, so that what comes late is not shown

// Opening.

async function open(item, push = true) {
  const turn = ++opening;
  Object.assign(app, { item, view: null, scan: null, targets: [], chosen: null, looking: null, covered: false });
  hover.slow = hover.known = false;
  stage.setMarks({ cross: null, preview: null });
  const address = item ? `/s/${item.id}` : "/";
  if (push && location.pathname !== address) history.pushState(null, "", address);
  queue.render();
  if (item) keep("seen", [...stored("seen", []).filter((id) => id !== item.id).slice(-999), item.id]);
  if (!item) { stage.clear(); panel.render(); return say(app.items.length ? "Choose an image to go on with, or open more." : "Open an image to begin."); }
  if (item.kind === "scan") await scan.openScan(item);
  else {
    const [image, view] = await Promise.all([fetchImage(`${queue.base(item)}/image`), get(queue.base(item))]);
    if (turn !== opening) return;
    stage.show(image, view.width, view.height);
    item.running ||= view.running;
    show(view);
  }
  if (turn !== opening) return;
  item.opened = true;
  $("query").value = asked((app.scan || app.view).query) || $("query").value;
  levels.set(app.scan ? "auto" : "full", false);
  if (document.activeElement.matches("button, input[type=file]")) $("image").focus({ preventScroll: true });
  say(summary());
  teach.look().catch(report); // what was corrected meanwhile may be enough to learn from
  const here = standing();
  if (item.running) watch(item, item.id, here).then(() => here() && say(summary())).catch(report);
  const next = queue.beside(1);
  if (next?.kind === "image") for (const ready of [fetchImage(`${queue.base(next)}/image`), get(queue.base(next))]) ready.catch(() => {});
}

const shown = (item, push) => open(item, push).catch(report);

function summary() {
  if (app.item.running) return "The agent is at work ...";
  const masks = app.targets.map((one) => `${one.name}: ${one.pixels.toLocaleString("en")} pixels`).join("; ");
  if (masks || app.view?.turns.length) return `${masks || "No mask"}. Correct it, or press enter to accept.`;
  const size = app.scan ? `${app.scan.axes.map((one) => one.count).join(" x ")} slices` : `${stage.width} x ${stage.height} pixels`;
  return `${size}. Say what to segment, or click on it.`;
}

// What the server says of the session that is open.
function show(view) {
  Object.assign(app, { view, targets: view.targets, looking: null });
  if (view.target === app.chosen) app.chosen = null;
  queue.update(app.item, app.scan ? { state: "corrected", query: app.scan.query } : view);
  panel.render();
}

// The same; of a scan, with the masks as they lie in the volume.
async function told(view) {
  show(view);
  if (app.scan) await scan.showAxis(true);
}

// Whether what is open now is still open later: the item, and of a scan the slice.
function standing() {
  const place = () => JSON.stringify([app.item?.id, app.scan && scan.where()]), then = place();
  return () => place() === then;
}

// Acting.

// One act in the session that is open now. body: a function where it depends on what the session says.
function act(path, body = {}, said = null) {
  const { item } = app, place = app.scan && scan.where(), here = item && standing();
  if (!item) return say("Open an image first, or take the sample.", "bad");
  stage.setMarks({ preview: null });
  app.chain = app.chain.then(async () => {
    const session = await sessionOf(item, place);
    if (here()) Object.assign(app, { view: session, targets: session.targets });
    const view = await post(`/v1/sessions/${session.id}/${path}`, typeof body === "function" ? body() : body);
    if (!here()) return queue.update(item, place ? { state: "corrected", query: item.query } : view);
    await told(view);
    say(said || summary());
  }).catch((error) => { report(error); panel.render(); });
  return app.chain;
}

// The session to act in; what was typed since it was opened counts from the first act on.
async function sessionOf(item, place) {
  if (place) return scan.sliceSession(place);
  const here = app.item === item, view = here && app.view ? app.view : await get(queue.base(item));
  const fresh = here && !view.turns.length && !view.edits.length && $("query").value.trim() && request() !== view.query;
  return fresh ? post(`${queue.base(item)}/query`, { query: request() }) : view;
}

async function run(turns) {
  const { item } = app, place = app.scan && scan.where();
  if (!item) return say("Open an image first, or take the sample.", "bad");
  if (item.running) return act("interrupt", {}, "You have taken over: click, or let the agent work again.");
  if (!$("query").value.trim()) { $("query").focus(); return say("Say what is to be segmented first.", "bad"); }
  const here = standing();
  if (!item.given) queue.askedFor(request());
  say("The agent is thinking ...", "busy");
  try {
    const { id } = await sessionOf(item, place);
    const working = queue.work(item, id, { query: request(), ...(turns ? { max_turns: turns } : {}) });
    panel.render();
    watch(item, id, here).catch(() => {}); // what fails there fails here as well
    const { ended, session } = await working;
    if (!here()) return queue.update(item, session);
    await told(session);
    say(turns && ended === "max_turns" ? summary() : ENDS[ended]);
    if (!place && item.state === "agent") queue.judge(item).catch(report);
  } finally { panel.render(); queue.workAhead(); }
}

// Follow what the agent does in a session as long as it is open, whoever let it work.
async function watch(item, id, here) {
  while (item.running && here()) {
    await new Promise((done) => setTimeout(done, 250));
    const view = await get(`/v1/sessions/${id}`);
    if (!item.mine) item.running = view.running;
    if (here() && (!item.running || view.turns.length !== app.view?.turns.length)) show({ ...view, running: item.running });
  }
}

async function accept() {
  const { item } = app;
  if (!item) return;
  if (app.scan) await scan.acceptScan().then(panel.render);
  else await act("accept", {}, `${item.name} is accepted.`);
  if (item.state !== "accepted" || app.item !== item) return;
  teach.look().catch(report);
  await queue.rankAnew();
  const next = queue.nextToDo();
  if (next) await open(next);
  else say("All images are accepted. Export the masks above.");
}

async function look(turn) {
  if (app.looking === turn) return back();
  app.targets = await get(`/v1/sessions/${app.view.id}/masks?turn=${turn}`);
  app.looking = turn;
  panel.render();
  say(`The masks as they were after turn ${turn}.`);
}

// What another tab, or another user, did meanwhile.
async function lookAgain() {
  await queue.load();
  const { item } = app, here = standing();
  if (!item || item.running || app.looking !== null) return;
  if (app.scan) return scan.showAxis(true);
  const view = await app.chain.then(() => get(queue.base(item)));
  if (here()) show(view);
}

function back() { Object.assign(app, { looking: null, targets: app.view.targets }); panel.render(); }

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
  levels: levels.drag,
  get slice() { return app.scan ? (step) => scan.goTo(app.scan.index + step) : null; },
  choose(name) { app.chosen = name; panel.render(); },
  remove: (name) => act("remove", { target: name }, `${name} is removed; undo brings it back.`),
  rename: (name, other) => act("rename", { target: name, name: other }, `${name} is now called ${other}.`),
  look: (turn) => look(turn).catch(report),
};

// The outline that a click here would give, where the server is fast enough.
function hover(place) {
  clearTimeout(hover.timer);
  hover.asked?.abort();
  const pixel = place && [Math.floor(place.x), Math.floor(place.y)].join();
  if (pixel !== hover.pixel) stage.setMarks({ preview: null });
  hover.pixel = pixel;
  const clicks = app.tool === "positive" || app.tool === "negative";
  if (place && clicks && app.view && !hover.slow && app.looking === null && !app.item.running) hover.timer = setTimeout(preview, 40, pixel);
}

async function preview(pixel) {
  const { view } = app, [x, y] = pixel.split(",").map(Number), began = performance.now();
  if (!view) return; // a slice without clicks was opened while this waited
  hover.asked = new AbortController();
  const body = { x, y, positive: app.tool === "positive", target: target() };
  const found = await post(`/v1/sessions/${view.id}/preview`, body, hover.asked.signal).catch(() => null);
  if (!found) return;
  hover.slow = hover.known && performance.now() - began > FAST; // the first one opens the image
  hover.known = true;
  if (hover.pixel === pixel && app.view === view) stage.setMarks({ preview: { path: outline(bars(found.mask)), colour: colour(found.name) } });
}

// Keys.

const tool = (name) => () => { app.tool = name; panel.render(); };
const range = (id, step) => () => { $(id).value = Number($(id).value) + step; $(id).dispatchEvent(new Event("input")); };
const KEYS = [
  ["p", "positive click", tool("positive")], ["n", "negative click (also the right button)", tool("negative")],
  ["b", "box; drag its corners to change it", tool("box")], ["d", "brush", tool("brush")], ["e", "eraser", tool("eraser")],
  ["{", "smaller brush", range("radius", -2)], ["}", "larger brush", range("radius", 2)],
  ["u", "undo (also ctrl z)", () => act("undo")], ["r", "redo (also ctrl y)", () => act("redo")],
  [" ", "run, or take over", () => run()], ["t", "one turn of the agent", () => run(1)],
  ["Enter", "accept and next", accept], [",", "image before", () => step(-1)], [".", "next image", () => step(1)],
  ["F2", "rename the object", () => panel.renameChosen()], ["Delete", "remove the object", () => acts.remove(target())],
  ["[", "less opacity", range("opacity", -10)], ["]", "more opacity", range("opacity", 10)],
  ["h", "hide the masks while held", () => { app.covered = true; panel.showMasks(); }],
  ["l", "level and width by dragging", tool("levels")], ["m", "move (also shift or middle button)", tool("move")],
  ["+", "closer", () => stage.zoom(1.25)], ["-", "farther", () => stage.zoom(0.8)], ["0", "whole image", () => stage.fit()],
  ["PageUp", "slice before", () => acts.slice?.(-1)], ["PageDown", "slice after", () => acts.slice?.(1)],
  ["g", "carry the masks on from this slice", () => app.scan && scan.propagate()], ["o", "open files", () => $("file").querySelector("input").click()],
  ["x", "act at the cross that the arrow keys move", place], ["?", "these keys", () => $("keys").showModal()],
];
const DO = Object.fromEntries(KEYS.map(([key, , does]) => [key, does]));

const step = (by) => (queue.beside(by) ? open(queue.beside(by)) : say(by > 0 ? "This is the last one." : "This is the first one."));

// The keyboard's click, at the cross; of a box one of two corners.
function place() {
  const { cross, corner } = stage;
  if (!cross) return moveCross(0, 0);
  const first = app.tool === "box" && !corner;
  stage.corner = first ? cross : null;
  if (first) return say("Now move to the opposite corner, and press x again.");
  const ends = (axis) => [cross[axis], corner?.[axis] ?? cross[axis]].sort((a, b) => a - b);
  const [[x0, x1], [y0, y1]] = [ends("x"), ends("y")];
  if (app.tool === "box") acts.box({ x0, y0, x1: x1 + 1, y1: y1 + 1 });
  else if (app.tool === "brush" || app.tool === "eraser") acts.brush([[cross.x + 0.5, cross.y + 0.5]], acts.radius(), app.tool === "brush");
  else acts.click(cross.x, cross.y, app.tool !== "negative");
}

function moveCross(dx, dy) {
  if (!stage.width) return;
  const { x, y } = stage.cross || { x: Math.floor(stage.width / 2), y: Math.floor(stage.height / 2) };
  stage.setMarks({ cross: { x: clamp(x + dx, 0, stage.width - 1), y: clamp(y + dy, 0, stage.height - 1) } });
  stage.reveal(stage.cross);
  say(`x ${stage.cross.x}, y ${stage.cross.y}; press x to act there.`);
}

addEventListener("keydown", (event) => {
  const at = event.target, control = event.ctrlKey || event.metaKey, key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  if (event.altKey || $("keys").open || at.matches("input[type=text], select")) return event.key === "Escape" && at.blur();
  const arrow = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  let done = DO[key];
  if (control) done = key === "z" ? DO[event.shiftKey ? "r" : "u"] : key === "y" ? DO.r : null;
  else if ((key === " " || key === "Enter") && at.matches("button, a, summary, input, label")) done = null;
  else if (/^[1-8]$/.test(key)) done = () => $("objects").children[key - 1]?.querySelector(".name").click();
  else if (arrow && at.id === "image") done = () => moveCross(...arrow.map((way) => way * (event.shiftKey ? 10 : 1)));
  else if (key === "Escape") done = () => { stage.setMarks({ cross: null, corner: null }); if (app.looking !== null) back(); };
  if (!done || (event.repeat && (key === "Enter" || key === " "))) return;
  event.preventDefault();
  Promise.resolve(done()).catch(report);
});
addEventListener("keyup", (event) => {
  if (event.key === "h" && app.covered) { app.covered = false; panel.showMasks(); }
});

// Beginning.

function wire() {
  const clicked = {
    sample: queue.openSample, turn: DO.t, undo: DO.u, redo: DO.r, fit: DO[0], previous: DO[","], next: DO["."], accept, back, fork, help: DO["?"],
    reset: () => act("reset", {}, "Back at the beginning; redo brings everything back."), delete: () => queue.remove(app.item),
  };
  for (const [id, does] of Object.entries(clicked)) $(id).onclick = () => Promise.resolve(does()).catch(report);
  $("home").onclick = (event) => { event.preventDefault(); queue.load().then(() => shown(null)); };
  $("ask").onsubmit = (event) => { event.preventDefault(); $("image").focus(); run().catch(report); };
  $("new-object").onsubmit = (event) => { event.preventDefault(); if ($("target").value.trim()) acts.choose($("target").value.trim()); $("target").value = ""; $("image").focus(); };
  for (const button of document.querySelectorAll("#tools [data-tool]")) button.onclick = tool(button.dataset.tool);
  $("opacity").oninput = () => { stage.setOpacity($("opacity").value / 100); keep("opacity", $("opacity").value); };
  $("radius").oninput = () => { $("radius-value").value = $("radius").value; if (stage.cursor) stage.setMarks({ cursor: { ...stage.cursor, radius: acts.radius() } }); };
  $("marks").onchange = panel.showMasks;
  Object.assign($("opacity"), { value: stored("opacity", 40) }).dispatchEvent(new Event("input"));
  const keys = [...KEYS, ["1-8", "choose an object"]].map(([key, what]) => [make("dt", { textContent: key.replace(" ", "space") }), make("dd", { textContent: what })]);
  $("keys").querySelector("dl").append(...keys.flat());
  addEventListener("click", (event) => { // back to the image, so that keys count there
    const pressed = event.detail && app.item && event.target.closest("button, .check");
    if (pressed && !event.target.closest("dialog, form, #objects")) $("image").focus({ preventScroll: true });
    if (!event.target.closest("#export") || event.target.closest("#export a")) $("export").open = false;
  });
  addEventListener("popstate", route);
  addEventListener("visibilitychange", () => document.hidden || lookAgain().catch(report));
}

async function route() {
  const [, id] = location.pathname.match(/^\/s\/(\w+)$/) || [];
  const item = app.items.find((one) => one.id === id);
  await shown(item || null, false);
  if (id && !item) say("What this address leads to is not here (any more), or belongs to another browser.", "bad");
}

async function begin() {
  queue.begin(shown, (view) => { show(view); say(summary()); });
  scan.begin(panel.render, () => say(summary()));
  panel.begin(acts);
  listen(stage, acts);
  wire();
  const [models] = await Promise.all([get("/v1/models"), queue.load()]);
  app.limits = models.limits;
  await route();
  queue.workAhead();
  await teach.begin();
}

begin().catch((error) => { panel.render(); report(error); });
