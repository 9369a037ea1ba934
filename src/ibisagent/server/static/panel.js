// The right side: objects, turns, downloads; and what can be pressed at all.

import { $, app, colour, keep, make, stage, target } from "/static/app.js";
import { renderScan } from "/static/scan.js";

const FILES = [["record", "Record"], ["report", "Report"], ["export", "Everything"], ["training", "Training data"]];

let acts; // { act(path, body, said), choose(name), look(turn) }

export const begin = (given) => { acts = given; };

export function render() {
  const { view, item } = app, open = Boolean(item);
  document.body.classList.toggle("idle", !open);
  document.body.classList.remove("loading");
  document.title = open ? `${item.name} - ibisagent` : "ibisagent";
  renderObjects();
  renderTurns();
  renderScan();
  showMasks();
  const busy = Boolean(item?.running);
  $("run").firstChild.textContent = busy ? "Stop " : "Run ";
  $("run").classList.toggle("busy", busy);
  for (const [id, can] of [["undo", view?.can_undo], ["redo", view?.can_redo], ["reset", view?.turns.length || view?.edits.length],
    ["accept", open], ["delete", open], ["fit", open], ["turn", open && !busy], ["previous", app.items.length], ["next", app.items.length]]) {
    $(id).disabled = !can;
  }
  for (const button of document.querySelectorAll("#tools [data-tool]")) button.setAttribute("aria-checked", button.dataset.tool === app.tool);
  document.body.dataset.tool = app.tool;
}

export function showMasks() {
  stage.setMasks(app.targets.map(({ name, mask }) => ({ name, mask, colour: colour(name), hidden: app.hidden.has(name) || app.covered })));
  const prompts = $("marks").checked && app.view && app.looking === null && !app.covered ? app.view.prompts : [];
  const last = prompts.at(-1);
  stage.setMarks({ prompts, editable: last?.kind === "box" ? last : null });
}

function renderObjects() {
  const names = app.targets.map((one) => one.name);
  if (app.item && !names.includes(target())) names.push(target());
  $("objects").replaceChildren(...(app.item ? names : []).map((name, index) => {
    const found = app.targets.find((one) => one.name === name);
    const paint = make("input", { type: "color", value: colour(name), title: "Colour", ariaLabel: `Colour of ${name}` });
    paint.oninput = () => { app.colours[name] = paint.value; keep("colours", app.colours); showMasks(); };
    const seen = make("input", { type: "checkbox", checked: !app.hidden.has(name), title: "Show", ariaLabel: `Show ${name}` });
    seen.onchange = () => { app.hidden[seen.checked ? "delete" : "add"](name); showMasks(); };
    const choose = make("button", { className: "name", textContent: name, title: index < 8 ? `Clicks mean this object (${index + 1})` : name, onclick: () => acts.choose(name) });
    choose.ondblclick = () => rename(name);
    const line = make("li", { className: name === target() ? "chosen" : "" }, paint, seen, choose);
    if (found) {
      const tell = make("span", { className: "pixels", textContent: found.pixels.toLocaleString("en") });
      const edit = make("button", { className: "quiet", textContent: "✎", title: "Rename (F2)", ariaLabel: `Rename ${name}`, onclick: () => rename(name) });
      const drop = make("button", { className: "quiet", textContent: "✕", title: "Remove (del)", ariaLabel: `Remove ${name}`, onclick: () => acts.remove(name) });
      line.append(tell, edit, drop);
    }
    return line;
  }));
}

export function renameChosen() { if (app.targets.some((one) => one.name === target())) rename(target()); }

function rename(name) {
  const other = prompt("Another name for this object", name)?.trim();
  if (other && other !== name) acts.rename(name, other);
}

function renderTurns() {
  const { view } = app;
  const turns = (view?.turns || []).map((turn) => ({ after: turn.number, line: turnLine(turn) }));
  const edits = (view?.edits || []).map(({ after, what }) => ({ after: after + 0.5, line: editLine(what) }));
  $("turns").replaceChildren(...[...turns, ...edits].sort((a, b) => a.after - b.after).map(({ line }) => line));
  const masks = app.targets.map(({ name }) => ["mask", `Mask: ${name}`, `mask?target=${encodeURIComponent(name)}`]);
  const link = ([className, textContent, path = className]) => make("a", { className, textContent, href: `/v1/sessions/${view.id}/${path}`, download: "" });
  $("downloads").replaceChildren(...(view ? [...FILES, ...masks].map(link) : []));
}

const editLine = (what) => make("li", { className: "user" }, make("div", {}, make("b", { textContent: "You " }), make("span", { className: "act", textContent: what })));

function turnLine(turn) {
  const act = turn.problem ? `could not be read: ${turn.problem}` : turn.actions.map((action) => described(action, turn.by)).join("; ");
  const button = make("button", { title: "See the masks after this turn", onclick: () => acts.look(turn.number) });
  if (turn.predicted_quality !== null) button.append(make("span", { className: "score", title: "predicted quality", textContent: turn.predicted_quality.toFixed(2) }));
  button.append(make("b", { textContent: turn.by === "agent" ? "Agent " : "You " }), turn.thought, make("span", { className: "act", textContent: act }));
  return make("li", { className: `${turn.by}${app.looking === turn.number ? " looked" : ""}` }, button);
}

function described(action, by) {
  if (action.kind === "click") return `click ${action.positive ? "+" : "-"} (${action.x}, ${action.y}) ${action.target}`;
  if (action.kind === "box") return `box (${action.x0}, ${action.y0}) (${action.x1}, ${action.y1}) ${action.target}`;
  if (action.kind === "undo") return `undo ${action.steps}`;
  return [by === "user" ? "accepted" : "stop", ...action.absent.map((name) => `absent: ${name}`)].join(", ");
}
