// COCO run lengths: by columns, outside and inside by turns, compressed as the COCO API does.

// The lengths of the runs, outside and inside by turns.
function lengthsOf(counts) {
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
  return lengths;
}

// What is inside, as [x, top, bottom) of vertical bars, column by column.
export function bars({ size: [height], counts }) {
  const found = [];
  let end = 0;
  for (const [index, length] of lengthsOf(counts).entries()) {
    let start = end;
    end += length;
    while (index % 2 && start < end) { // a run goes on in the next column
      const x = Math.floor(start / height), top = start % height, bottom = Math.min(height, top + end - start);
      found.push([x, top, bottom]);
      start += bottom - top;
    }
  }
  return found;
}

export function fill(context, found, colour) {
  context.fillStyle = colour;
  for (const [x, top, bottom] of found) context.fillRect(x, top, 1, bottom - top);
}

// The outline of a mask as a path in pixels of the image. On a vertical line, what one side shows and the other does not
// lies between the ends of the bars of both sides, taken in pairs.
export function outline(found) {
  const path = new Path2D(), ends = new Map();
  for (const [x, top, bottom] of found) {
    for (const y of [top, bottom]) { path.moveTo(x, y); path.lineTo(x + 1, y); }
    for (const line of [x, x + 1]) ends.has(line) ? ends.get(line).push(top, bottom) : ends.set(line, [top, bottom]);
  }
  for (const [x, places] of ends) {
    places.sort((a, b) => a - b);
    for (let at = 0; at < places.length; at += 2) { path.moveTo(x, places[at]); path.lineTo(x, places[at + 1]); }
  }
  return path;
}
