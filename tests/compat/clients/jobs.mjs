// The loop of every client script, as in jobs.py: one line of JSON in, one line of JSON out, until stdin ends.
import { createRequire } from 'node:module'
import { createInterface } from 'node:readline'
import { pathToFileURL } from 'node:url'

// Resolved from the working directory, where node_modules is; this file lives elsewhere.
const require = createRequire(process.cwd() + '/')

/** As in jobs.py. */
export const TOKENS = 4

/** An installed package. */
export async function installed(name) {
  return import(pathToFileURL(require.resolve(name)).href)
}

/** Answer jobs. checks: job -> check -> function; tell: what to report of an error. */
export async function serve(checks, tell) {
  for await (const line of createInterface({ input: process.stdin })) {
    const report = {}
    const job = JSON.parse(line)
    for (const [name, check] of Object.entries(checks(job))) {
      if (job.only && !job.only.includes(name)) continue
      try {
        report[name] = await check()
      } catch (error) {
        report[name] = tell(error)
      }
    }
    process.stdout.write(JSON.stringify(report) + '\n')
  }
}
