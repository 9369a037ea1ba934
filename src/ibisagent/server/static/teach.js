// The teacher: the agent learns in the background what was accepted and corrected, and then goes on with what it learned.

import { call, get, post } from "/static/api.js";
import { $, app, keep, report, say, stored } from "/static/app.js";
import { base, update, workAhead } from "/static/queue.js";

const EVERY = 2000; // ms between two looks
let now = { state: "none" }, timer;

export function begin() {
  $("learn").onclick = () => press().catch(report);
  return look();
}

async function press() {
  if (now.state !== "running") {
    show(await post("/v1/teaching"));
    say("The agent learns in the background. Go on with your work; it says when it is done.");
  } else if (confirm("Stop learning? What it learned so far is kept for the next time.")) show(await call("DELETE", "/v1/teaching"));
}

// How far it is; again in a moment while it is under way.
export async function look() {
  const { state } = now;
  show(await get("/v1/teaching"));
  if (state === "running" && now.state !== "running") say(now.said, now.state === "failed" ? "bad" : "");
  if (now.agent !== stored("agent", 0)) await goOn();
}

function show(view) {
  now = view;
  const running = view.state === "running", missing = view.least - view.labelled;
  $("learn").textContent = running ? "Stop learning" : "Learn from my corrections";
  $("learn").disabled = !running && missing > 0;
  $("learning").hidden = !running;
  $("learning").value = view.share ?? 0;
  $("learned").textContent = view.said || (missing > 0 ? `${missing} more to correct or accept before it can learn` : "");
  $("learned").title = view.folder ? `${view.said} The taught agent: ${view.folder}` : view.said;
  clearTimeout(timer);
  if (running) timer = setTimeout(() => look().catch(report), EVERY);
}

// With another agent: what the old one did ahead and nobody has looked at is done again.
async function goOn() {
  keep("agent", now.agent);
  const seen = stored("seen", []), ahead = (item) => item.kind === "image" && item.state === "agent" && !item.running && item !== app.item;
  for (const item of $("ahead").checked ? app.items.filter((one) => ahead(one) && !seen.includes(one.id)) : []) {
    update(Object.assign(item, { rank: null }), await post(`${base(item)}/reset`, { expected: "agent" }).catch(() => get(base(item))));
  }
  workAhead();
}
