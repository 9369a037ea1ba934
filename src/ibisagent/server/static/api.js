// The public HTTP API, as the page uses it. A failure is an Error whose message is for the user.

export async function call(method, path, body, signal) {
  const options = { method, signal, body };
  if (body && !(body instanceof FormData)) Object.assign(options, { body: JSON.stringify(body), headers: { "content-type": "application/json" } });
  const answer = await fetch(path, options).catch((error) => {
    throw error.name === "AbortError" ? error : new Error("the server does not answer: is it still running? Nothing that was shown is lost");
  });
  if (answer.ok) return answer.status === 204 ? null : answer.json();
  if (answer.status === 401) location.href = "/login";
  const said = await answer.json().then((found) => found.detail).catch(() => null);
  throw Object.assign(new Error(said || `the server answers ${answer.status}`), { status: answer.status });
}

export const get = (path) => call("GET", path);
export const post = (path, body = {}, signal) => call("POST", path, body, signal);

const kept = new Map(); // images that were loaded, the latest last
const KEPT = 24;

// An image, decoded: shown without delay when it was asked for before.
export function fetchImage(url) {
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
