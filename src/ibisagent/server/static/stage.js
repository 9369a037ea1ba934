// The image, its masks over it, and marks over both. The image is laid out at the size that it is seen at; masks and marks
// are drawn at that size, some way beyond what is seen. All are only moved by a transform, so that moving about is the
// compositor's work alone, and none of it is scaled at every frame.

import { bars, fill, outline } from "/static/masks.js";

const LARGEST = 64; // screen pixels of an image pixel
const SHARP = 3; // from here on pixels are seen as squares
const HANDLE = 7;
const BEYOND = 256; // screen pixels on each side that masks and marks are drawn beyond what is seen

export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

export class Stage {
  constructor(root) {
    this.root = root;
    this.stage = root.appendChild(Object.assign(document.createElement("div"), { className: "stage" }));
    this.overlay = Object.assign(document.createElement("canvas"), { hidden: true }); // the masks, pixel by pixel
    this.paint = root.appendChild(document.createElement("canvas"));
    this.marks = root.appendChild(document.createElement("canvas"));
    this.drawn = { x: 0, y: 0 }; // where the image was when both were drawn
    this.shapes = new Map(); // by run lengths: bars and outline
    this.targets = [];
    this.prompts = [];
    this.scale = 1;
    this.x = this.y = this.width = this.height = 0;
    this.opacity = 0.4;
    new ResizeObserver(() => this.resized()).observe(root);
  }

  // Show an image; `stay` keeps place and zoom, for one of the same size.
  show(image, width, height, stay = false) {
    const same = stay && this.width === width && this.height === height;
    this.image?.remove();
    this.image = image;
    Object.assign(image, { alt: "", draggable: false });
    this.stage.prepend(image);
    if (!this.overlay.isConnected) this.stage.append(this.overlay);
    [this.width, this.height] = [width, height];
    if (this.overlay.width !== width || this.overlay.height !== height) Object.assign(this.overlay, { width, height });
    if (same) this.laidOut();
    else this.fit();
  }

  clear() {
    this.stage.replaceChildren();
    Object.assign(this, { image: null, width: 0, height: 0, targets: [], prompts: [] });
    this.draw(true);
  }

  // targets: [{ name, mask, colour, hidden }]
  setMasks(targets) {
    const context = this.overlay.getContext("2d"), before = this.shapes;
    context.reset();
    this.shapes = new Map();
    this.targets = targets.map((target) => {
      const key = `${target.mask.size} ${target.mask.counts}`, shape = before.get(key) || shaped(target.mask);
      this.shapes.set(key, shape);
      if (!target.hidden) fill(context, shape.bars, target.colour);
      return { ...target, ...shape };
    });
    this.draw(true);
  }

  setOpacity(share) { this.opacity = share; this.draw(true); }

  // What lies over the masks: prompts, draft (a box), stroke ({ points, radius, colour }), cursor ({ x, y, radius }),
  // cross ({ x, y }), preview ({ mask, colour }); those not named stay.
  setMarks(marks) { Object.assign(this, marks); this.draw(); }

  // Grey levels from `low` to `high` (0 to 255) over the whole range; null shows the image as it is.
  setLevels(low, high) {
    const plain = low === null || (low === 0 && high === 255);
    const slope = plain ? 1 : 255 / Math.max(high - low, 1e-3);
    for (const channel of document.querySelectorAll("#levels feComponentTransfer > *")) {
      channel.setAttribute("slope", slope);
      channel.setAttribute("intercept", plain ? 0 : (-low / 255) * slope);
    }
    if (this.image) this.image.style.filter = plain ? "" : "url(#levels)";
  }

  // Where a pointer is, in pixels of the image.
  at(event) {
    const box = this.root.getBoundingClientRect();
    return { x: (event.clientX - box.left - this.x) / this.scale, y: (event.clientY - box.top - this.y) / this.scale };
  }

  inside({ x, y }) { return x >= 0 && y >= 0 && x < this.width && y < this.height; }

  fit() {
    const { clientWidth, clientHeight } = this.root;
    this.fitted = true;
    if (!this.width || !clientWidth) return; // it is done as soon as there is room
    this.scale = Math.min(LARGEST, clientWidth / this.width, clientHeight / this.height);
    this.x = (clientWidth - this.width * this.scale) / 2;
    this.y = (clientHeight - this.height * this.scale) / 2;
    this.laidOut();
  }

  zoom(factor, clientX, clientY) {
    const box = this.root.getBoundingClientRect();
    const [x, y] = [(clientX ?? box.left + box.width / 2) - box.left, (clientY ?? box.top + box.height / 2) - box.top];
    const smallest = Math.min(1, 60 / Math.max(this.width, this.height));
    const scale = clamp(this.scale * factor, smallest, LARGEST);
    this.x = x - ((x - this.x) * scale) / this.scale;
    this.y = y - ((y - this.y) * scale) / this.scale;
    this.scale = scale;
    this.fitted = false;
    this.laidOut();
  }

  pan(dx, dy) {
    this.x += dx;
    this.y += dy;
    this.fitted = false;
    this.moved();
  }

  // Bring a place into view, for the keyboard.
  reveal({ x, y }) {
    const margin = 30, [left, top] = [this.x + x * this.scale, this.y + y * this.scale];
    const { clientWidth, clientHeight } = this.root;
    const move = (at, size) => (at < margin ? margin - at : at > size - margin ? size - margin - at : 0);
    this.pan(move(left, clientWidth), move(top, clientHeight));
  }

  resized() {
    const { clientWidth, clientHeight } = this.root, ratio = window.devicePixelRatio;
    const [width, height] = [clientWidth + 2 * BEYOND, clientHeight + 2 * BEYOND];
    for (const canvas of [this.paint, this.marks]) {
      Object.assign(canvas, { width: width * ratio, height: height * ratio });
      Object.assign(canvas.style, { width: `${width}px`, height: `${height}px`, left: `${-BEYOND}px`, top: `${-BEYOND}px` });
    }
    if (this.fitted || !this.width) this.fit();
    this.draw(true);
  }

  laidOut() {
    Object.assign(this.image.style, { width: `${this.width * this.scale}px`, height: `${this.height * this.scale}px` });
    this.image.classList.toggle("sharp", this.scale >= SHARP);
    this.moved();
    this.draw(true);
  }

  moved() {
    const [x, y] = [Math.round(this.x), Math.round(this.y)], [dx, dy] = [x - this.drawn.x, y - this.drawn.y];
    this.stage.style.transform = `translate(${x}px, ${y}px)`;
    this.paint.style.transform = this.marks.style.transform = `translate(${dx}px, ${dy}px)`;
    if (Math.max(Math.abs(dx), Math.abs(dy)) > BEYOND) this.draw();
  }

  // masks: whether they have changed as well, or how large they are seen.
  draw(masks = false) {
    this.stale ||= masks;
    this.frame ??= requestAnimationFrame(() => {
      const [x, y] = [Math.round(this.x), Math.round(this.y)];
      this.stale ||= x !== this.drawn.x || y !== this.drawn.y;
      this.drawn = { x, y };
      this.paint.style.transform = this.marks.style.transform = "";
      if (this.stale) this.drawMasks();
      this.drawMarks();
      this.frame = this.stale = null;
    });
  }

  // A canvas with nothing on it, to be drawn on in pixels of the screen from the image's corner on; or hidden, as even an
  // empty one is laid over the image.
  cleared(canvas, empty) {
    canvas.hidden = empty;
    const context = canvas.getContext("2d"), ratio = window.devicePixelRatio;
    context.reset();
    context.scale(ratio, ratio);
    context.translate(this.drawn.x + BEYOND, this.drawn.y + BEYOND);
    return context;
  }

  drawMasks() {
    const empty = !this.width || !this.opacity || this.targets.every((one) => one.hidden);
    const context = this.cleared(this.paint, empty);
    if (empty) return;
    context.globalAlpha = this.opacity;
    context.imageSmoothingEnabled = this.scale < SHARP;
    context.drawImage(this.overlay, 0, 0, this.width * this.scale, this.height * this.scale);
  }

  drawMarks() {
    const { preview, stroke: line, draft, cursor, cross, prompts, targets, scale } = this;
    const outlined = this.opacity ? targets.filter((one) => !one.hidden) : [];
    const empty = !this.width || !(preview || line || draft || cursor || cross || prompts.length || outlined.length);
    const context = this.cleared(this.marks, empty);
    if (empty) return;
    context.lineCap = context.lineJoin = "round";
    context.scale(scale, scale); // in pixels of the image
    for (const one of outlined) stroke(context, one.outline, one.colour, 1.5 / scale);
    if (preview) stroke(context, preview.path, preview.colour, 2 / scale, [5 / scale, 4 / scale]);
    if (line) stroke(context, way(line.points), line.colour, Math.max(1, 2 * line.radius));
    context.scale(1 / scale, 1 / scale); // in those of the screen
    for (const prompt of prompts) {
      if (prompt.kind === "box") this.drawBox(context, prompt, prompt === this.editable);
      else this.drawClick(context, prompt);
    }
    if (draft) this.drawBox(context, draft, false);
    if (cursor) clear(context, disc(cursor.x * scale, cursor.y * scale, Math.max(1, cursor.radius * scale)), "#fff");
    if (cross) {
      const [x, y] = [(cross.x + 0.5) * scale, (cross.y + 0.5) * scale];
      const arms = [[1, 0], [-1, 0], [0, 1], [0, -1]].map(([dx, dy]) => [[x + dx * 4, y + dy * 4], [x + dx * 14, y + dy * 14]]);
      for (const arm of arms) clear(context, way(arm), "#fde047");
    }
  }

  drawBox(context, box, handles) {
    const [x0, y0, x1, y1] = [box.x0, box.y0, box.x1, box.y1].map((side) => side * this.scale);
    clear(context, way([[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]]), "#fff");
    for (const [x, y] of handles ? [[x0, y0], [x1, y0], [x0, y1], [x1, y1]] : []) {
      context.fillStyle = "#fff";
      context.fill(disc(x, y, HANDLE / 2));
    }
  }

  // Which corner of the editable box a place is at, as its opposite corner.
  grabbed({ x, y }) {
    if (!this.editable) return null;
    const { x0, y0, x1, y1 } = this.editable, near = (HANDLE + 2) / this.scale;
    const opposite = (at, low, high) => (Math.abs(at - low) <= near ? high : Math.abs(at - high) <= near ? low : null);
    const found = { x: opposite(x, x0, x1), y: opposite(y, y0, y1) };
    return found.x === null || found.y === null ? null : found;
  }

  drawClick(context, { x, y, positive }) {
    const [cx, cy] = [(x + 0.5) * this.scale, (y + 0.5) * this.scale];
    context.fillStyle = positive ? "#059669" : "#dc2626";
    context.fill(disc(cx, cy, 7));
    stroke(context, disc(cx, cy, 7), "#fff", 2);
    stroke(context, way([[cx - 3, cy], [cx + 3, cy]]), "#fff", 2);
    if (positive) stroke(context, way([[cx, cy - 3], [cx, cy + 3]]), "#fff", 2);
  }
}

function shaped(mask) { const found = bars(mask); return { bars: found, outline: outline(found) }; }

function stroke(context, path, colour, width, dash = []) {
  Object.assign(context, { strokeStyle: colour, lineWidth: width });
  context.setLineDash(dash);
  context.stroke(path);
}

// A line that is seen on any ground.
function clear(context, path, colour) { stroke(context, path, "#000a", 4); stroke(context, path, colour, 1.5); }

function way(points) {
  const path = new Path2D();
  points.forEach(([x, y], index) => (index ? path.lineTo(x, y) : path.moveTo(x, y)));
  if (points.length === 1) path.lineTo(points[0][0] + 0.01, points[0][1]);
  return path;
}

function disc(x, y, radius) { const path = new Path2D(); path.arc(x, y, radius, 0, 2 * Math.PI); return path; }
