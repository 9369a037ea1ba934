// The public HTTP API, as the page uses it. A failure is an Error whose message is for the user.

export async function call(method, path, body, signal) {
  const form = body instanceof FormData;
  const options = { method, signal, credentials: "same-origin" };
  if (body !== undefined) options.body = form ? body : JSON.stringify(body);
  if (body !== undefined && !form) options.headers = { "content-type": "application/json" };
  const answer = await reached(() => fetch(path, options));
  if (answer.status === 204) return null;
  return answer.json();
}

export const get = (path, signal) => call("GET", path, undefined, signal);
export const post = (path, body = {}, signal) => call("POST", path, body, signal);

// The server-sent events that a POST is answered with, as [name, data].
export async function* events(path, body) {
  const headers = { "content-type": "application/json" };
  const answer = await reached(() => fetch(path, { method: "POST", headers, body: JSON.stringify(body) }));
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const whole = text.split("\n\n");
    text = whole.pop();
    for (const event of whole) {
      const [, name, data] = event.match(/^event: (\w+)\ndata: (.*)$/s);
      yield [name, JSON.parse(data)];
    }
  }
}

async function reached(ask) {
  let answer;
  try {
    answer = await ask();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("the server does not answer: is it still running? Nothing that was shown is lost");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) location.href = "/login";
  const said = await answer.json().then((found) => found.detail).catch(() => null);
  const error = new Error(said || `the server answers ${answer.status}`);
  error.status = answer.status;
  throw error;
}

const kept = new Map(); // images that were loaded, the latest last
const KEPT = 24;

// An image, decoded: shown without delay when it was asked for before.
export function picture(url) {
  let loading = kept.get(url);
  if (!loading) {
    const image = new Image();
    image.src = url;
    loading = image.decode().then(() => image, () => {
      kept.delete(url);
      throw new Error("the image cannot be loaded: is the server still running?");
    });
  }
  kept.delete(url);
  kept.set(url, loading);
  for (const old of [...kept.keys()].slice(0, -KEPT)) kept.delete(old);
  return loading;
}
