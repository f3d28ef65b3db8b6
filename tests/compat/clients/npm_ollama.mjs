// What the unmodified `ollama` package of npm sees: one JSON object of check -> result.
// Usage: node npm_ollama.mjs BASE_URL MODEL [API_KEY]; run where node_modules is.
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

// Resolved from the working directory, since this file lives elsewhere.
const require = createRequire(process.cwd() + '/')
const { Ollama } = await import(pathToFileURL(require.resolve('ollama')).href)

const [host, model, key] = process.argv.slice(2)
const headers = key ? { Authorization: `Bearer ${key}` } : undefined
const client = new Ollama({ host, headers })
const options = { num_predict: 12, temperature: 0, seed: 1 }
const messages = [{ role: 'user', content: 'Say hello.' }]

async function streamed(parts) {
  let text = '', count = 0, last
  for await (const part of await parts) {
    text += part.message ? part.message.content : part.response
    count += 1
    last = part
  }
  return { parts: count, text, done: last.done, eval_count: last.eval_count }
}

function whole(answer) {
  return { text: answer.message ? answer.message.content : answer.response, done: answer.done, eval_count: answer.eval_count }
}

const checks = {
  list: async () => (await client.list()).models.map((each) => each.model),
  show: async () => ({ capabilities: (await client.show({ model })).capabilities }),
  generate: async () => whole(await client.generate({ model, prompt: 'Say hello.', options })),
  generate_streamed: () => streamed(client.generate({ model, prompt: 'Say hello.', options, stream: true })),
  chat: async () => whole(await client.chat({ model, messages, options })),
  chat_streamed: () => streamed(client.chat({ model, messages, options, stream: true })),
  embed: async () => (await client.embed({ model, input: ['one', 'two'] })).embeddings.map((vector) => vector.length),
  unknown_model: async () => whole(await client.generate({ model: 'no-such-model', prompt: 'Hello' })),
}

const report = {}
for (const [name, check] of Object.entries(checks)) {
  try {
    report[name] = await check()
  } catch (error) {
    report[name] = { error: String(error.message), status: error.status_code, name: error.name }
  }
}
console.log(JSON.stringify(report))
