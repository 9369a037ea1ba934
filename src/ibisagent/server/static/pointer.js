// What pointers and the wheel do on the image, by tool. Acts are told to `acts`; nothing here speaks to the server.
//
// acts: tool(), radius(), colour(), click(x, y, positive), box(box, edited), brush(points, radius, add),
//       hover(place or null), levels(dx, dy, done), slice(step), or null for slice where there are none.

import { clamp } from "/static/stage.js";

export function listen(stage, acts) {
  const { root } = stage;
  const pointers = new Map();
  let drag = null; // what a move, and the end, of the pointer that is down does: { move(event, before), done(event) }

  root.addEventListener("contextmenu", (event) => event.preventDefault());

  root.addEventListener("pointerdown", (event) => {
    if (!stage.width) return;
    root.focus({ preventScroll: true });
    root.setPointerCapture(event.pointerId);
    pointers.set(event.pointerId, event);
    stage.setMarks({ cross: null, draft: null, stroke: null });
    drag = pointers.size > 1 ? { move: pinch } : begun(event);
  });

  function begun(event) {
    const tool = acts.tool();
    if (event.button === 1 || event.shiftKey || tool === "move") return { move: pan };
    if (event.button === 2) return click(event, false);
    if (tool === "levels" || event.altKey) return levels(event);
    const place = stage.at(event), opposite = stage.grabbed(place);
    if (opposite) return box(opposite, stage.editable);
    if (tool === "box") return box(place, null);
    if (tool === "brush" || tool === "eraser") return stroke(place, tool === "brush");
    return click(event, tool === "positive");
  }

  root.addEventListener("pointermove", (event) => {
    const before = pointers.get(event.pointerId), tool = acts.tool();
    if (before) {
      pointers.set(event.pointerId, event);
      drag?.move?.(event, before);
    }
    if (drag?.move === pan) return; // nothing is asked of the layout, so that a frame stays cheap
    const place = stage.at(event), brush = tool === "brush" || tool === "eraser";
    if (brush || stage.cursor) stage.setMarks({ cursor: brush && event.pointerType !== "touch" ? { ...place, radius: acts.radius() } : null });
    acts.hover(!drag && stage.inside(place) ? place : null);
  });

  const up = (event) => {
    if (!pointers.delete(event.pointerId) || pointers.size) return; // one finger of two
    const { done } = drag;
    drag = null;
    stage.setMarks({ draft: null, stroke: null });
    if (event.type === "pointerup") done?.(event);
  };
  root.addEventListener("pointerup", up);
  root.addEventListener("pointercancel", up);
  root.addEventListener("pointerleave", () => { stage.setMarks({ cursor: null }); acts.hover(null); });

  // What a drag can be.

  function pan(event, before) { stage.pan(event.clientX - before.clientX, event.clientY - before.clientY); }

  function pinch(event, before) {
    const other = [...pointers.values()].find((one) => one.pointerId !== event.pointerId);
    if (!other) return;
    const apart = (one) => Math.hypot(one.clientX - other.clientX, one.clientY - other.clientY);
    stage.pan((event.clientX - before.clientX) / 2, (event.clientY - before.clientY) / 2);
    const [x, y] = [(event.clientX + other.clientX) / 2, (event.clientY + other.clientY) / 2];
    if (apart(before) > 0) stage.zoom(apart(event) / apart(before), x, y);
  }

  function click(start, positive) {
    return { done(event) {
      const place = stage.at(event), still = Math.hypot(event.clientX - start.clientX, event.clientY - start.clientY) < 6;
      if (still && stage.inside(place)) acts.click(Math.floor(place.x), Math.floor(place.y), positive);
    } };
  }

  function levels(start) {
    const show = (event, done) => acts.levels(event.clientX - start.clientX, event.clientY - start.clientY, done);
    return { move: (event) => show(event, false), done: (event) => show(event, true) };
  }

  function box(corner, edited) {
    const whole = (a, b, most) => [Math.floor(Math.min(a, b)), Math.ceil(Math.max(a, b))].map((end) => clamp(end, 0, most));
    const drawn = (event) => {
      const end = stage.at(event), [x0, x1] = whole(corner.x, end.x, stage.width), [y0, y1] = whole(corner.y, end.y, stage.height);
      return { kind: "box", x0, y0, x1, y1 };
    };
    return {
      move: (event) => stage.setMarks({ draft: drawn(event) }),
      done(event) {
        const found = drawn(event);
        if (found.x1 > found.x0 && found.y1 > found.y0) acts.box(found, edited);
      },
    };
  }

  function stroke(start, add) {
    const points = [];
    const reach = ({ x, y }) => {
      const radius = acts.radius(), last = points.at(-1);
      const inside = x > -radius && y > -radius && x < stage.width + radius && y < stage.height + radius;
      const far = !last || Math.hypot(x - last[0], y - last[1]) >= Math.max(0.5, radius / 8);
      if (inside && far && points.length < 5000) points.push([x, y]);
      if (points.length) stage.setMarks({ stroke: { points, radius, colour: add ? acts.colour() + "99" : "#ffffff88" } });
    };
    reach(start);
    return {
      move(event) { for (const one of event.getCoalescedEvents()) reach(stage.at(one)); },
      done() { if (points.length) acts.brush(points, acts.radius(), add); },
    };
  }

  let rest = 0; // of a wheel's way to the next slice
  root.addEventListener("wheel", (event) => {
    event.preventDefault();
    if (!stage.width) return;
    const way = event.deltaY * (event.deltaMode === 1 ? 16 : 1);
    if (!acts.slice || event.ctrlKey) return stage.zoom(Math.exp(-way * (event.ctrlKey ? 0.01 : 0.0015)), event.clientX, event.clientY);
    rest += way;
    if (Math.abs(rest) < 30) return;
    acts.slice(Math.sign(rest));
    rest = 0;
  }, { passive: false });
}
