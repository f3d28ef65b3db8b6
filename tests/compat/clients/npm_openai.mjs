// What the unmodified `openai` package of npm sees. See jobs.mjs.
import { installed, serve, TOKENS } from './jobs.mjs'

const { OpenAI } = await installed('openai')
const messages = [{ role: 'user', content: 'Say hello.' }]
const more = { max_tokens: TOKENS, temperature: 0 }
// As often as npm_ollama.mjs.
const LEAVES = 9

async function chat_streamed(client, model, said) {
  let text = '', finish = [], usage, count = 0
  const asked = { model, messages: said, ...more, stream: true, stream_options: { include_usage: true } }
  for await (const chunk of await client.chat.completions.create(asked)) {
    count += 1
    for (const choice of chunk.choices) {
      text += choice.delta.content ?? ''
      if (choice.finish_reason) finish.push(choice.finish_reason)
    }
    usage = chunk.usage ?? usage
  }
  return { text, finish, tokens: [usage.completion_tokens], prompt: usage.prompt_tokens, chunks: count }
}

async function conversation(client, model) {
  const said = [], counts = []
  for (const content of ['My name is Ann.', 'What is my name?']) {
    said.push({ role: 'user', content })
    const answer = await chat_streamed(client, model, said)
    said.push({ role: 'assistant', content: answer.text })
    counts.push([answer.prompt, answer.tokens[0], answer.chunks])
  }
  return counts
}

// Leave a stream after its first chunk, over and over; then ask something short.
async function leave(client, model) {
  const asked = { model, prompt: '1 2 3 4 5 6 7 8 9 10 11 12', temperature: 0, stream: true, max_tokens: 4000 }
  let left = 0
  for (let round = 0; round < LEAVES; round += 1) {
    const stream = await client.completions.create(asked)
    for await (const chunk of stream) {
      stream.controller.abort()
      left += 1
      break
    }
  }
  return { left, after: (await client.chat.completions.create({ model, messages, ...more })).choices[0].finish_reason }
}

await serve(
  ({ url, model, key, leaves }) => {
    const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: key || 'unused', maxRetries: 0 })
    if (leaves) return { leave: () => leave(client, model) }
    return {
      models: async () => (await client.models.list()).data.map((each) => each.id),
      model: async () => (await client.models.retrieve(model)).id,
      chat: async () => {
        const answer = await client.chat.completions.create({ model, messages, ...more })
        const [choice] = answer.choices
        return { text: choice.message.content, finish: choice.finish_reason, tokens: answer.usage.completion_tokens }
      },
      chat_streamed: () => chat_streamed(client, model, messages),
      conversation: () => conversation(client, model),
      response: async () => {
        const answer = await client.responses.create({ model, input: 'Say hello.', max_output_tokens: TOKENS, temperature: 0 })
        return { text: answer.output_text, status: answer.status, tokens: answer.usage.output_tokens }
      },
      unknown_model: async () => client.chat.completions.create({ model: 'no-such-model', messages }),
    }
  },
  (error) => ({ error: error.constructor.name, status: error.status, message: String(error.message) }),
)
