// The server's side: which models there are, and an answer as it comes.

export class ServerError extends Error {}

async function request(path, key, options = {}) {
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const said = await response.json().catch(() => null);
  const message = said?.error?.message ?? `The server answered ${response.status}.`;
  throw new ServerError(response.status === 401 ? `${message}: give it under Settings` : message);
}

export async function models(key) {
  return (await (await request("v1/models", key)).json()).data;
}

// Yields {text, tokens, finish, usage} as they come; `signal` ends it.
export async function* answer(body, key, signal) {
  const sent = { ...body, stream: true, stream_options: { include_usage: true } };
  const headers = { "Content-Type": "application/json" };
  const response = await request("v1/chat/completions", key, {
    method: "POST", headers, body: JSON.stringify(sent), signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ServerError("The answer broke off.");
    held += value;
    const events = held.split("\n\n");
    held = events.pop();
    for (const event of events) {
      const data = event.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const document = JSON.parse(data);
      if (document.error) throw new ServerError(document.error.message);
      const choice = document.choices[0];
      yield {
        text: choice?.delta.content ?? "",
        tokens: choice?.logprobs?.content ?? [],
        finish: choice?.finish_reason,
        usage: document.usage,
      };
    }
  }
}
