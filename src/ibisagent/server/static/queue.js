// The images to label: opened, in a row, worked on ahead by the agent.

import { call, get, post } from "/static/api.js";
import { $, app, keep, make, report, request, say, stored } from "/static/app.js";

const AT_ONCE = 2; // images that the agent works on ahead
const IMAGES = /\.(png|jpe?g|tiff?|bmp)$/i;
const SCANS = /\.(nii|nii\.gz|mha|mhd|nrrd)$/i;
const DICOM = /\.(dcm|dicom|ima)$/i;
const PATHS = { image: "/v1/sessions", scan: "/v1/scans" };
const STATES = { new: "new", agent: "agent done", corrected: "corrected", accepted: "accepted" };

let open, changed; // show an item; show what the agent made of the one that is open
let ahead = 0;

export function begin(show, shown) {
  [open, changed] = [show, shown];
  for (const input of document.querySelectorAll("input[type=file]")) {
    input.onchange = () => {
      take([...input.files].map((file) => [file, file.webkitRelativePath || file.name]), input.webkitdirectory);
      input.value = "";
    };
  }
  $("filter").onchange = render;
  $("order").value = stored("order", "added");
  $("order").onchange = () => { keep("order", $("order").value); rankAnew().catch(report); };
  $("ahead").checked = stored("ahead", true);
  $("ahead").onchange = () => { keep("ahead", $("ahead").checked); workAhead(); };
  for (const kind of ["dragover", "dragleave", "drop"]) addEventListener(kind, (event) => dropped(event, kind));
}

export async function load() {
  const known = new Map(app.items.map((item) => [item.id, item])), found = await get("/v1/worklist");
  const opened = app.items.filter((item) => !known.has(item.id)); // meanwhile
  app.items = [...found.map((item) => Object.assign(known.get(item.id) || {}, item)), ...opened];
  render();
}

// What is opened.

async function dropped(event, kind) {
  if (!event.dataTransfer?.types.includes("Files")) return;
  event.preventDefault();
  document.body.classList.toggle("dropping", kind === "dragover");
  if (kind !== "drop") return;
  const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry()).filter(Boolean);
  const found = await Promise.all(entries.map(walk));
  take(found.flat(), entries.some((entry) => entry.isDirectory));
}

// All files of an entry, with their paths.
async function walk(entry) {
  if (entry.isFile) return [[await new Promise((done, failed) => entry.file(done, failed)), entry.fullPath.slice(1)]];
  const reader = entry.createReader(), found = [];
  for (;;) { // some at a time
    const some = await new Promise((done, failed) => reader.readEntries(done, failed));
    if (!some.length) return found;
    for (const one of some) found.push(...(await walk(one)));
  }
}

// Files with their paths; of a folder only those that look like images or scans. DICOM files of a folder are one scan.
async function take(files, folder) {
  const loads = [], series = new Map();
  for (const [file, path] of files.sort((a, b) => a[1].localeCompare(b[1], undefined, { numeric: true }))) {
    const name = file.name;
    if (DICOM.test(name) || (!name.includes(".") && (await isDicom(file)))) {
      const parent = path.slice(0, -name.length);
      if (!series.has(parent)) loads.push(series.set(parent, ["scan", []]).get(parent));
      series.get(parent)[1].push(file);
    } else if (SCANS.test(name)) loads.push(["scan", [file]]);
    else if (IMAGES.test(name) || !folder) loads.push(["image", [file]]);
  }
  if (!loads.length && files.length) say("There is no image or scan in that folder.", "bad");
  const failed = [];
  let first = null;
  for (const [index, [kind, parts]] of loads.entries()) {
    if (loads.length > 1) say(`Opening ${index + 1} of ${loads.length}: ${parts[0].name}`, "busy");
    try {
      const item = await send(kind, parts);
      app.items.push(item);
      render();
      if (!first) await open((first = item));
    } catch (error) { failed.push(error.message); }
  }
  if (failed.length) report(new Error(failed.slice(0, 3).join(" | ") + (failed.length > 3 ? ` and ${failed.length - 3} more` : "")));
  else if (loads.length > 1) say(`${loads.length} opened. Say what is to be segmented, and run.`);
  workAhead();
}

async function isDicom(file) { return (await file.slice(128, 132).text()) === "DICM"; }

async function send(kind, files) {
  const most = app.limits?.upload_bytes, size = files.reduce((sum, file) => sum + file.size, 0);
  if (most && size > most) {
    const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(1)} MB`;
    throw new Error(`${files[0].name}: too large, ${megabytes(size)}; the limit of this server is ${megabytes(most)} (--max-upload)`);
  }
  const form = new FormData();
  form.set("query", request());
  for (const file of files) form.append(kind === "scan" ? "files" : "image", file, file.name);
  const view = await call("POST", PATHS[kind], form);
  return { id: view.id, kind, name: view.name ?? view.image, query: view.query, state: "new", reliability: null, rank: null, running: false, opened: true };
}

export async function openSample() {
  if (!$("query").value.trim()) $("query").value = "Segment the optic disc.";
  const image = await fetch("/static/sample/eye.jpg").then((answer) => answer.blob());
  await take([[new File([image], "eye.jpg", { type: "image/jpeg" }), "eye.jpg"]], false);
}

export async function remove(item) {
  if (!confirm(`Delete ${item.name} and all that was made of it?`)) return;
  await call("DELETE", base(item));
  const after = beside(1) || beside(-1);
  app.items = app.items.filter((one) => one !== item);
  await open(after === item ? null : after);
}

// The row.

// As the strip shows them. Doubtful first: what the agent did, least reliable first, then what is new, then the rest.
// Useful first: doubtful as well, but unlike each other and what is labelled already, as the server ranks them.
export function row() {
  const filter = $("filter").value;
  const shown = app.items.filter((item) => filter === "all" || (item.state === "accepted") === (filter === "accepted"));
  const order = $("order").value;
  if (order === "added") return shown;
  const place = (item) => (order === "doubt" ? item.reliability ?? 1 : 1 - 1 / (item.rank ?? Infinity));
  const rank = (item) => (item.state === "agent" ? place(item) : { new: 2, corrected: 3, accepted: 4 }[item.state]);
  return [...shown].sort((a, b) => rank(a) - rank(b));
}

export function beside(step) {
  const shown = row(), at = shown.indexOf(app.item);
  return shown[at < 0 ? 0 : at + step] || null;
}

// What is still to do after the open one, in the order of the row.
export function nextToDo() {
  const shown = row(), at = shown.indexOf(app.item);
  return [...shown.slice(at + 1), ...shown.slice(0, Math.max(0, at))].find((item) => item.state !== "accepted") || null;
}

export function update(item, view) {
  Object.assign(item, { state: view.state, query: view.query });
  if (item.state !== "agent") item.reliability = null;
  render();
}

export const base = (item) => `${PATHS[item.kind]}/${item.id}`;

export function render() {
  const accepted = app.items.filter((item) => item.state === "accepted").length;
  $("progress").value = app.items.length ? accepted / app.items.length : 0;
  $("count").textContent = app.items.length ? `${accepted} of ${app.items.length} accepted` : "";
  const old = new Map([...$("strip").children].map((child) => [child.dataset.id, child]));
  const thumbs = row().map((item) => thumb(item, old.get(item.id)));
  const same = thumbs.length === old.size && thumbs.every((one, at) => one === $("strip").children[at]);
  if (!same) $("strip").replaceChildren(...thumbs); // which would take the focus from what has it
}

function thumb(item, element) {
  if (!element) {
    const image = make("img", { alt: "", loading: "lazy" });
    const button = make("button", { onclick: () => open(item) }, image, make("span", { className: "state" }));
    button.append(make("span", { className: "name", textContent: item.name }), make("span", { className: "score" }));
    element = make("li", { className: item.kind }, button);
    element.dataset.id = item.id;
  }
  const button = element.firstElementChild, small = button.firstElementChild;
  // A scan is not read for its thumbnail alone, and is never copied for that.
  if (!small.src && (item.opened || item.kind === "image")) small.src = `${base(item)}/thumbnail`;
  const sure = item.reliability === null ? "" : Math.round(item.reliability * 100);
  const label = `${item.name}: ${item.running ? "the agent is at work" : STATES[item.state]}${sure === "" ? "" : `, reliability ${sure} %`}`;
  Object.assign(button, { className: `${item.state}${item.running ? " busy" : ""}`, title: label, ariaLabel: label });
  button.setAttribute("aria-current", item === app.item);
  Object.assign(button.lastElementChild, { textContent: sure, hidden: sure === "" });
  if (item === app.item && app.seen !== item) {
    app.seen = item;
    button.scrollIntoView({ block: "nearest", inline: "nearest" });
  }
  return element;
}

// Ahead.

export function askedFor(query) { app.request = query; keep("request", query); }

// The agent takes new images one after another, as long as they are there, with their own request, or the last one.
// Masks that came with an image are for a user to correct, not for the agent.
export function workAhead() {
  while (ahead < AT_ONCE && $("ahead").checked) {
    const next = row().concat(app.items).find((item) => isWaiting(item));
    if (!next) return;
    ahead += 1;
    const failed = (error) => { // 409: another tab, or another user, has it
      next.failed = true;
      return error.status === 409 ? get(base(next)).then((view) => update(next, view)) : report(new Error(`${next.name}: ${error.message}`));
    };
    runAhead(next).catch(failed).catch(report).finally(() => { ahead -= 1; workAhead(); });
  }
}

const isWaiting = (item) => item.kind === "image" && item.state === "new" && (item.given === "query" || (!item.given && app.request)) && item !== app.item && !item.running && !item.failed;

async function runAhead(item) {
  const { session } = await work(item, item.id, { expected: "new", ...(item.given ? {} : { query: app.request }) });
  if (app.item === item) changed(session);
  else update(item, session);
  if (item.state === "agent") await judge(item);
}

// Let the agent work in a session of an item until it ends.
export async function work(item, id, body) {
  item.running = item.mine = true;
  render();
  try {
    return await post(`/v1/sessions/${id}/run`, body);
  } finally { item.running = item.mine = false; render(); }
}

// How far the agent's masks can be trusted.
export async function judge(item) { item.reliability = await get(`${base(item)}/reliability`); await rankAnew(); }

// What is most useful next changes with every image that the agent has done or a user has labelled.
export async function rankAnew() {
  if ($("order").value === "useful") {
    const ranks = new Map((await get("/v1/worklist")).map((item) => [item.id, item.rank]));
    for (const item of app.items) item.rank = ranks.get(item.id) ?? null;
  }
  render();
}
