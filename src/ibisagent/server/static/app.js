// What the page knows, and the few things that all its parts use. The server holds the state; this is what is shown.

import { Stage } from "/static/stage.js";

export const $ = (id) => document.getElementById(id);
export const stage = new Stage($("image"));

const PALETTE = ["#34d399", "#fb923c", "#60a5fa", "#f472b6", "#facc15", "#22d3ee", "#f87171", "#a78bfa"];
const UNNAMED = "target"; // the request of a session about which nobody has asked anything yet

export const app = {
  limits: null, // of the server
  items: [], // of the worklist
  item: null, // the one that is open
  chain: Promise.resolve(), // acts in sessions, one after another
  view: null, // its session as the server told it last; of a scan, that of the slice, or null
  targets: [], // the masks that are shown
  scan: null, // the scan that is open: its view, axis, index, window
  tool: "positive",
  chosen: null, // the object that a click means; null: the session's own
  hidden: new Set(),
  looking: null, // the turn whose masks are looked at
  covered: false, // the masks are hidden for a moment
  request: stored("request", ""), // the last one that the agent was asked
  colours: stored("colours", {}),
};

export function stored(name, otherwise) {
  try { return JSON.parse(localStorage.getItem(name)) ?? otherwise; } catch { return otherwise; }
}

export const keep = (name, value) => localStorage.setItem(name, JSON.stringify(value));
export function say(text, kind = "") { $("status").textContent = text; $("status").className = kind; }
export const report = (error) => { if (error.name !== "AbortError") say(`That did not work: ${error.message}`, "bad"); };
export const asked = (query) => (query === UNNAMED ? "" : query);
export const request = () => $("query").value.trim() || UNNAMED;
export const target = () => app.chosen || app.view?.target || (app.scan && named(request())) || UNNAMED;

// What a request names, roughly: the server says it exactly once there is a session.
const named = (query) => query.replace(/^(please )?(segment|find|show|outline)( the| an?)? /i, "").replace(/[.?!]+$/, "");

export function colour(name) {
  if (!app.colours[name]) {
    const used = new Set(app.targets.map((one) => app.colours[one.name]));
    const free = PALETTE.find((one) => !used.has(one)) || PALETTE[app.targets.length % PALETTE.length];
    app.colours = Object.fromEntries([...Object.entries(app.colours).slice(-199), [name, free]]);
    keep("colours", app.colours);
  }
  return app.colours[name];
}

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
