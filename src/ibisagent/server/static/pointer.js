// What pointers and the wheel do on the image, by tool. Acts are told to `acts`; nothing here speaks to the server.
//
// acts: tool(), radius(), colour(), click(x, y, positive), box(box, edited), brush(points, radius, add),
//       hover(place or null), levels(dx, dy, done), slice(step), or null for slice where there are none.

export function listen(stage, acts) {
  const { root } = stage;
  const pointers = new Map();
  let drag = null; // { kind, ... } of the pointer that is down

  root.addEventListener("contextmenu", (event) => event.preventDefault());

  root.addEventListener("pointerdown", (event) => {
    if (!stage.width) return;
    root.focus({ preventScroll: true });
    root.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
    stage.setMarks({ cross: null });
    if (pointers.size === 2) { stage.setMarks({ draft: null, stroke: null }); drag = { kind: "pinch" }; return; }
    drag = begun(event, stage.at(event));
    if (drag.kind === "stroke") stroke(drag, stage.at(event));
  });

  function begun(event, place) {
    const tool = acts.tool();
    if (event.button === 1 || event.shiftKey || tool === "move") return { kind: "pan", x: event.clientX, y: event.clientY };
    if (event.button === 2) return { kind: "click", positive: false, x: event.clientX, y: event.clientY };
    if (tool === "levels" || event.altKey) return { kind: "levels", x: event.clientX, y: event.clientY };
    const corner = stage.grabbed(place);
    if (corner) return { kind: "box", corner, edited: stage.editable };
    if (tool === "box") return { kind: "box", corner: place, edited: null };
    if (tool === "brush" || tool === "eraser") return { kind: "stroke", points: [], add: tool === "brush" };
    return { kind: "click", positive: tool === "positive", x: event.clientX, y: event.clientY };
  }

  root.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId), tool = acts.tool();
    if (before && drag?.kind === "pan") { // nothing is asked of the layout, so that a frame stays cheap
      pointers.set(event.pointerId, event);
      return stage.pan(event.clientX - before.clientX, event.clientY - before.clientY);
    }
    const place = stage.at(event);
    if (before) {
      if (drag?.kind === "pinch" && pointers.size === 2) pinch(event);
      else if (drag?.kind === "levels") acts.levels(event.clientX - drag.x, event.clientY - drag.y, false);
      else if (drag?.kind === "box") stage.setMarks({ draft: boxed(drag.corner, place) });
      else if (drag?.kind === "stroke") for (const one of event.getCoalescedEvents()) stroke(drag, stage.at(one));
      pointers.set(event.pointerId, event);
    }
    const brush = tool === "brush" || tool === "eraser";
    if (brush || stage.cursor) stage.setMarks({ cursor: brush && event.pointerType !== "touch" ? { ...place, radius: acts.radius() } : null });
    acts.hover(!drag && stage.inside(place) ? place : null);
  });

  const up = (event) => {
    if (!pointers.delete(event.pointerId)) return;
    const done = drag, place = stage.at(event);
    if (pointers.size) return; // one finger of two
    drag = null;
    stage.setMarks({ draft: null, stroke: null });
    if (event.type === "pointercancel" || !done) return;
    if (done.kind === "levels") acts.levels(event.clientX - done.x, event.clientY - done.y, true);
    if (done.kind === "stroke" && done.points.length) acts.brush(done.points, acts.radius(), done.add);
    if (done.kind === "box") {
      const box = boxed(done.corner, place);
      if (box.x1 > box.x0 && box.y1 > box.y0) acts.box(box, done.edited);
    }
    const still = done.kind === "click" && Math.hypot(event.clientX - done.x, event.clientY - done.y) < 6;
    if (still && stage.inside(place)) acts.click(Math.floor(place.x), Math.floor(place.y), done.positive);
  };
  root.addEventListener("pointerup", up);
  root.addEventListener("pointercancel", up);
  root.addEventListener("pointerleave", () => { stage.setMarks({ cursor: null }); acts.hover(null); });

  function stroke(one, { x, y }) {
    const radius = acts.radius();
    const inside = x > -radius && y > -radius && x < stage.width + radius && y < stage.height + radius;
    const last = one.points.at(-1);
    const far = !last || Math.hypot(x - last[0], y - last[1]) >= Math.max(0.5, radius / 8);
    if (inside && far && one.points.length < 5000) one.points.push([x, y]);
    const colour = one.add ? acts.colour() + "99" : "#ffffff88";
    stage.setMarks({ stroke: one.points.length ? { points: one.points, radius, colour } : null });
  }

  // Whole pixels between two corners, inside the image.
  function boxed(a, b) {
    const within = (value, most) => Math.max(0, Math.min(most, value));
    return {
      kind: "box",
      x0: within(Math.floor(Math.min(a.x, b.x)), stage.width), x1: within(Math.ceil(Math.max(a.x, b.x)), stage.width),
      y0: within(Math.floor(Math.min(a.y, b.y)), stage.height), y1: within(Math.ceil(Math.max(a.y, b.y)), stage.height),
    };
  }

  function pinch(event) {
    const [other] = [...pointers.values()].filter((one) => one.pointerId !== event.pointerId);
    const before = pointers.get(event.pointerId);
    const apart = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
    stage.pan((event.clientX - before.clientX) / 2, (event.clientY - before.clientY) / 2);
    const [x, y] = [(event.clientX + other.clientX) / 2, (event.clientY + other.clientY) / 2];
    if (apart(before) > 0) stage.zoom(apart(event) / apart(before), x, y);
  }

  let rest = 0; // of a wheel's way to the next slice
  root.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (!stage.width) return;
    const lines = event.deltaMode === 1 ? 16 : 1;
    if (!acts.slice || event.ctrlKey) {
      stage.zoom(Math.exp(-event.deltaY * lines * (event.ctrlKey ? 0.01 : 0.0015)), event.clientX, event.clientY);
      return;
    }
    rest += event.deltaY * lines;
    if (Math.abs(rest) < 30) return;
    acts.slice(Math.sign(rest));
    rest = 0;
  }, { passive: false });
}
