// COCO run lengths: by columns, outside and inside by turns, compressed as the COCO API does.

// [start, length] of the runs inside, over the pixels column by column.
export function runs({ counts }) {
  const lengths = [];
  for (let at = 0; at < counts.length;) {
    let value = 0, shift = 0, chunk;
    do {
      chunk = counts.charCodeAt(at++) - 48;
      value |= (chunk & 31) << shift;
      shift += 5;
    } while (chunk & 32);
    if (chunk & 16) value |= -1 << shift;
    lengths.push(lengths.length > 2 ? value + lengths[lengths.length - 2] : value);
  }
  const inside = [];
  let start = 0;
  lengths.forEach((length, index) => {
    if (index % 2 && length) inside.push([start, length]);
    start += length;
  });
  return inside;
}

// The same as [x, top, bottom) of vertical bars, column by column.
export function bars(code) {
  const height = code.size[0], found = [];
  for (let [start, length] of runs(code)) {
    while (length > 0) {
      const top = start % height, part = Math.min(length, height - top);
      found.push([Math.floor(start / height), top, top + part]);
      start += part;
      length -= part;
    }
  }
  return found;
}

export function fill(context, found, colour) {
  context.fillStyle = colour;
  for (const [x, top, bottom] of found) context.fillRect(x, top, 1, bottom - top);
}

// The outline of a mask as a path in pixels of the image.
export function outline(found) {
  const path = new Path2D();
  const columns = new Map();
  for (const [x, top, bottom] of found) {
    if (!columns.has(x)) columns.set(x, []);
    columns.get(x).push([top, bottom]);
    for (const y of [top, bottom]) { path.moveTo(x, y); path.lineTo(x + 1, y); }
  }
  for (const [x, spans] of columns) {
    for (const side of [-1, 1]) {
      const line = side < 0 ? x : x + 1;
      for (const [top, bottom] of without(spans, columns.get(x + side) || [])) {
        path.moveTo(line, top);
        path.lineTo(line, bottom);
      }
    }
  }
  return path;
}

// What of `spans` is not covered by `others`; both sorted and apart.
function without(spans, others) {
  const left = [];
  for (let [top, bottom] of spans) {
    for (const [from, to] of others) {
      if (to <= top || from >= bottom) continue;
      if (from > top) left.push([top, from]);
      top = Math.max(top, to);
    }
    if (top < bottom) left.push([top, bottom]);
  }
  return left;
}
