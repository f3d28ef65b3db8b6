// What the unmodified `ollama` package of npm sees. See jobs.mjs.
import { installed, serve, TOKENS } from './jobs.mjs'

const { Ollama } = await installed('ollama')
const options = { num_predict: TOKENS, temperature: 0, seed: 1 }
const messages = [{ role: 'user', content: 'Say hello.' }]
// Greedily continued, counting has no end.
const endless = { prompt: '1 2 3 4 5 6 7 8 9 10 11 12', raw: true, options: { num_predict: -1, temperature: 0, repeat_penalty: 1.0 } }
// See python_ollama.py.
const call = {
  type: 'object',
  properties: {
    name: { const: 'get_weather' },
    arguments: { type: 'object', properties: { city: { enum: ['Oslo'] } }, required: ['city'], additionalProperties: false },
  },
  required: ['name', 'arguments'],
  additionalProperties: false,
}
const tool = {
  type: 'function',
  function: {
    name: 'get_weather',
    description: 'Tell the weather of a city',
    parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
  },
}
const template = `{{ if .Tools }}{{ .Tools }}{{ end }}{{ range .Messages }}<|im_start|>{{ .Role }}
{{ if .Thinking }}<think>{{ .Thinking }}</think>{{ end }}{{ .Content }}{{ range .ToolCalls }}
{"name": "{{ .Function.Name }}", "arguments": {{ .Function.Arguments }}}{{ end }}<|im_end|>
{{ end }}<|im_start|>assistant
{{ if .Think }}<think>{{ end }}`
// How often a stream is left: more often than any server of these tests has slots.
const LEAVES = 9

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

// How many tokens came with their likelihood, of how many others each, and whether each is one.
function likely(logprobs) {
  const others = [...new Set(logprobs.map((each) => (each.top_logprobs ?? []).length))]
  return [logprobs.length, others, logprobs.every((each) => each.logprob <= 0)]
}

async function conversation(client, model) {
  const said = [], counts = []
  for (const content of ['My name is Ann.', 'What is my name?']) {
    said.push({ role: 'user', content })
    let text = '', count = 0, last
    for await (const part of await client.chat({ model, messages: said, options, stream: true })) {
      text += part.message.content
      count += 1
      last = part
    }
    said.push({ role: 'assistant', content: text })
    counts.push([last.prompt_eval_count, last.eval_count, count])
  }
  return counts
}

function inference(client, model) {
  const format = { type: 'object', properties: { ok: { type: 'boolean' } }, required: ['ok'] }
  return {
    list: async () => (await client.list()).models.map((each) => each.model),
    show: async () => ({ capabilities: (await client.show({ model })).capabilities }),
    generate: async () => whole(await client.generate({ model, prompt: 'Say hello.', options })),
    generate_streamed: () => streamed(client.generate({ model, prompt: 'Say hello.', options, stream: true })),
    generate_logprobs: async () => likely((await client.generate({ model, prompt: 'Say hello.', options, logprobs: true })).logprobs),
    chat: async () => whole(await client.chat({ model, messages, options })),
    chat_streamed: () => streamed(client.chat({ model, messages, options, stream: true })),
    chat_logprobs: async () => likely((await client.chat({ model, messages, options, logprobs: true, top_logprobs: 3 })).logprobs),
    conversation: () => conversation(client, model),
    structured: async () =>
      JSON.parse((await client.chat({ model, messages, format, options: { temperature: 0, num_predict: 64 } })).message.content),
    embed: async () => (await client.embed({ model, input: ['one', 'two'] })).embeddings.map((vector) => vector.length),
    unknown_model: async () => whole(await client.generate({ model: 'no-such-model', prompt: 'Hello' })),
  }
}

// Leave a stream after its first part, over and over, in the two ways the package knows; then ask something short.
async function leave(client, model) {
  const ends = []
  for (let round = 0; round < LEAVES; round += 1) {
    try {
      const stream = await client.generate({ model, ...endless, stream: true })
      for await (const part of stream) {
        if (part.done) break
        if (round % 2) stream.abort()
        else client.abort()
      }
      ends.push('ended')
    } catch (error) {
      ends.push(error.name)
    }
  }
  return { ends, after: whole(await client.generate({ model, prompt: 'Say hello.', options })).done }
}

async function last(parts) {
  let final
  for await (const part of await parts) final = part.status
  return final
}

async function refused(asked) {
  try {
    await asked
    return null
  } catch (error) {
    return { error: error.message, status: error.status_code }
  }
}

// What only the local server does, in this order.
function library(client, model, published) {
  const asking = [{ role: 'user', content: 'How is the weather in Oslo?' }]
  return {
    leave: () => leave(client, model),
    create: async () => {
      const final = await last(client.create({ model: 'able', from: model, template, stream: true }))
      await client.copy({ source: model, destination: published })
      return { last: final, can: (await client.show({ model: 'able' })).capabilities.sort() }
    },
    tools: async () => {
      const more = { tools: [tool], options: { ...options, num_predict: 64 } }
      const { message } = await client.chat({ model: 'able', messages: asking, format: call, think: false, ...more })
      const found = message.tool_calls[0].function
      return { name: found.name, arguments: found.arguments, refused: await refused(client.chat({ model, messages, tools: [tool] })) }
    },
    thinking: async () => {
      const { message } = await client.chat({ model: 'able', messages, think: true, options })
      let thoughts = ''
      const parts = await client.chat({ model: 'able', messages, think: true, options, stream: true })
      for await (const part of parts) thoughts += part.message.thinking ?? ''
      return { thoughts: [message.thinking, thoughts], refused: await refused(client.chat({ model, messages, think: true })) }
    },
    push: () => last(client.push({ model: published, stream: true })),
    pull: async () => {
      await client.delete({ model: published })
      const gone = !(await client.list()).models.some((each) => each.model === published)
      return { was_gone: gone, last: await last(client.pull({ model: published, stream: true })) }
    },
    ps: async () => {
      await client.generate({ model, prompt: 'Say hello.', options })
      const [found] = (await client.ps()).models
      return { name: found.model, size: found.size, until: found.expires_at }
    },
    delete: async () => {
      for (const name of ['able', published]) await client.delete({ model: name })
      return { left: (await client.list()).models.map((each) => each.model), again: await refused(client.delete({ model: 'able' })) }
    },
  }
}

await serve(
  ({ url, model, key, publish_as }) => {
    const client = new Ollama({ host: url, headers: key ? { Authorization: `Bearer ${key}` } : undefined })
    return publish_as ? library(client, model, publish_as) : inference(client, model)
  },
  (error) => ({ error: String(error.message), status: error.status_code, name: error.name }),
)
