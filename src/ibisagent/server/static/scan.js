// A scan: its slices, its window, and masks that are carried from slice to slice.

import { get, fetchImage, post } from "/static/api.js";
import { $, app, colour, make, report, request, say, stage, target } from "/static/app.js";
import { clamp } from "/static/stage.js";
import { update } from "/static/queue.js";

const NEAR = 3; // slices that are fetched beforehand

let shown, told; // render what is known; say what is shown
let loading = false;

export function begin(render, tell) {
  [shown, told] = [render, tell];
  $("slice").oninput = () => goTo(Number($("slice").value));
  $("propagate").onclick = propagate;
  $("find").onclick = find;
  $("unpropagate").onclick = () => change("undo", {}, "What was carried on is taken back.");
}

export const axis = () => app.scan.axes.find((one) => one.name === app.scan.axis);
const path = (rest) => `/v1/scans/${app.item.id}/${rest}`;
export const where = () => ({ axis: app.scan.axis, index: app.scan.index });
const imageOf = (index) => path(`image?${new URLSearchParams({ axis: app.scan.axis, index, window: app.scan.window })}`);

export async function openScan(item) {
  const view = await get(`/v1/scans/${item.id}`);
  const [, along, index] = location.hash.match(/^#(\w+)\/(\d+)$/) || [];
  const main = view.axes.find((one) => one.name === along) || view.axes[0];
  const middle = Math.floor(main.count / 2);
  app.scan = { ...view, axis: main.name, index: Math.min(Number(index ?? middle), main.count - 1), window: "auto" };
  $("axes").replaceChildren(...view.axes.map((one) => make("button", { role: "radio", textContent: one.name, onclick: () => goAlong(one) })));
  update(item, view);
  await showAxis(false);
}

function goAlong(one) {
  Object.assign(app.scan, { axis: one.name, index: Math.floor(one.count / 2) });
  showAxis(false).then(told).catch(report);
}

export function goTo(index) {
  const within = clamp(index, 0, axis().count - 1);
  if (within === app.scan.index) return;
  app.scan.index = within;
  renderScan();
  if (!loading) showSlice(true).then(told).catch(report); // else the one under way goes on to it
}

// Show the slice that is wanted, until that is the one that is shown.
export async function showSlice(stay) {
  const { scan } = app;
  loading = true;
  try {
    let wanted; // its address names axis, index and window
    do {
      wanted = imageOf(scan.index);
      const [image, slice] = await Promise.all([fetchImage(wanted), get(path(`slice?${new URLSearchParams(where())}`))]);
      if (app.scan !== scan) return;
      stage.show(image, axis().width, axis().height, stay);
      stage.setLevels(null);
      Object.assign(app, { targets: slice.targets, view: slice.session, looking: null });
      shown();
    } while (wanted !== imageOf(scan.index));
  } finally { loading = false; }
  history.replaceState(history.state, "", `#${scan.axis}/${scan.index}`);
  for (let step = 1; step <= NEAR; step++) {
    for (const index of [scan.index + step, scan.index - step]) {
      if (index >= 0 && index < axis().count) fetchImage(imageOf(index)).catch(() => {});
    }
  }
}

export function renderScan() {
  $("scan").hidden = !app.scan;
  if (!app.scan) return;
  const { scan } = app, main = axis();
  for (const button of $("axes").children) button.setAttribute("aria-checked", button.textContent === scan.axis);
  Object.assign($("slice"), { max: main.count - 1, value: scan.index });
  $("slice-number").value = `${scan.index + 1} of ${main.count}`;
  const doubted = scan.doubted.filter(([along]) => along === scan.axis).map(([, index]) => index + 1);
  $("doubted").textContent = doubted.length ? `Look at ${doubted.slice(0, 6).join(", ")}${doubted.length > 6 ? " ..." : ""}` : "";
  $("unpropagate").hidden = !scan.can_undo;
  $("propagate").disabled = $("find").disabled = Boolean(scan.progress);
  const canvas = $("shown"), context = canvas.getContext("2d");
  canvas.width = main.count;
  context.clearRect(0, 0, main.count, 6);
  for (const [index, acted] of Object.entries(scan.shown || {})) {
    context.fillStyle = acted ? "#fbbf24" : colour(target());
    context.fillRect(Number(index), 0, 1, 6);
  }
}

// The slice, and which others of its axis have masks.
export async function showAxis(stay) {
  const { scan } = app;
  await showSlice(stay);
  if (app.scan !== scan) return; // another item was opened while the slice came
  const found = await get(path(`shown?${new URLSearchParams({ axis: scan.axis })}`)).catch(report);
  if (app.scan === scan && found) scan.shown = found;
  renderScan();
}

// Something that concerns the whole scan; progress is shown meanwhile.
async function change(what, body, said) {
  const { item, scan } = app;
  scan.progress = [0, axis().count];
  renderScan();
  const watch = setInterval(async () => {
    const view = await get(`/v1/scans/${item.id}`).catch(() => null);
    if (view?.progress && app.item === item) say(`${view.progress[0]} of about ${view.progress[1]} slices`, "busy");
  }, 700);
  try {
    await app.chain; // what was done on the slice counts
    const view = await post(`/v1/scans/${item.id}/${what}`, body);
    Object.assign(scan, view);
    update(item, view);
    if (app.item !== item) return;
    await showAxis(true);
    say(said);
  } catch (error) {
    scan.progress = null;
    report(error);
  } finally { clearInterval(watch); if (app.item === item) renderScan(); }
}

export const propagate = () => change("propagate", where(), "Carried on. Look through the slices; what is wrong is corrected and carried on again.");

async function find() {
  if (!$("query").value.trim()) return say("Say what is to be segmented first.", "bad");
  say("The agent looks through the scan ...", "busy");
  return change("find", { query: request(), axis: app.scan.axis }, "The agent has been through the scan.");
}

export async function acceptScan() {
  const { item, scan } = app;
  await app.chain;
  const view = await post(`/v1/scans/${item.id}/accept`);
  Object.assign(scan, view);
  update(item, view);
}

// The session of the slice that is shown, to act in. Programs open it the same way.
export async function sliceSession(place) {
  if (request() !== app.scan.query) Object.assign(app.scan, await post(path("query"), { query: request() }));
  const view = await post(path("session"), { ...place, window: app.scan.window });
  (app.scan.shown ||= {})[place.index] = true;
  return view;
}
