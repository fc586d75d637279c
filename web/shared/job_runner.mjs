// Runs jobs of the page itself on ComfyUI's queue: one at a time per LatestJobRunner, with the newest state, and
// without touching other clients' jobs.

import { t } from './texts.mjs'

/**
 * @typedef {{ filename: string, subfolder: string, type: string }} ImageFile an image on the server, as /view finds it
 *
 * @typedef {object} Listener receives the events of a job
 * @property {(files: ImageFile[], nodeId: string) => void} onImages a node of the job has saved or previewed images
 * @property {(url: string) => void} onPreview a preview image from the sampler
 * @property {(fraction: number) => void} onProgress of the active node, 0 to 1; 1 when nothing runs
 * @property {(message: string) => void} onError the message is empty when a job starts
 *
 * @typedef {object} Server the methods of ComfyUI's `api` that are used here
 * @property {(path: string, options?: RequestInit) => Promise<Response>} fetchApi
 * @property {(path: string) => string} apiURL
 * @property {(type: any, listener: (event: any) => void) => void} addEventListener
 * @property {string} [clientId]
 */

/** @type {Map<string, LatestJobRunner>} job id -> runner, for the pack's jobs that have not ended */
const activeJobs = new Map()

/** @type {Set<string>} ids of the pack's canceled jobs that may still be written to the server's history */
const canceledJobs = new Set()

/** Subscribe to the server's events for the jobs of all runners. @param {Server} server */
export function listenForJobs(server) {
  const runnerOf = (/** @type {CustomEvent} */ { detail }) => activeJobs.get(detail?.prompt_id ?? detail?.jobId)
  server.addEventListener('execution_start', (event) => runnerOf(event)?.onStart())
  server.addEventListener('reconnected', () => failLostJobs(server))
  server.addEventListener('status', () => deleteCanceledJobs(server))
  server.addEventListener('execution_success', (event) => runnerOf(event)?.end())
  server.addEventListener('execution_interrupted', (event) => {
    const runner = runnerOf(event)
    if (!runner) return
    runner.end()
    canceledJobs.add(event.detail.prompt_id)
    deleteCanceledJobs(server)
  })
  server.addEventListener('execution_error', (event) => runnerOf(event)?.fail(event.detail.exception_message))
  server.addEventListener('executed', (event) => {
    const { output, node } = event.detail
    if (output?.images) runnerOf(event)?.listener.onImages(output.images, node)
  })
  server.addEventListener('b_preview_with_metadata', (event) => runnerOf(event)?.showPreview(event.detail.blob))
  server.addEventListener('progress_state', (event) => {
    const nodes = Object.values(event.detail.nodes ?? {})
    const [active] = nodes.filter(({ state }) => state === 'running')
    if (active) runnerOf(event)?.listener.onProgress(active.value / active.max)
  })
}

/** Fail the jobs that the server no longer has after a lost connection. @param {Server} server */
async function failLostJobs(server) {
  const ids = await queuedJobIds(server).catch(() => /** @type {string[]} */ ([]))
  for (const [id, runner] of activeJobs) if (!ids.includes(id)) runner.fail(t('connectionLost'))
}

/**
 * Delete canceled jobs from the server's history, where they would show as errors. A job that is still in the queue
 * is deleted later, since the server writes it to the history when it leaves the queue.
 * @param {Server} server
 */
async function deleteCanceledJobs(server) {
  if (!canceledJobs.size) return
  const queued = await queuedJobIds(server).catch(() => [...canceledJobs])
  const ended = [...canceledJobs].filter((id) => !queued.includes(id))
  if (!ended.length) return
  for (const id of ended) canceledJobs.delete(id)
  post(server, '/history', { delete: ended }).catch(() => {})
}

/** Ids of the running and pending jobs of the server. @param {Server} server @returns {Promise<string[]>} */
async function queuedJobIds(server) {
  const { queue_running: running, queue_pending: pending } = await (await server.fetchApi('/queue')).json()
  return [...running, ...pending].map(([, id]) => id)
}

export class LatestJobRunner {
  /**
   * @param {Server} server
   * @param {() => Promise<object>} createRequest returns the body for /prompt, without prompt_id and client_id
   * @param {Listener} listener
   * @param {() => number} [delay] milliseconds from the last `schedule()` to the run
   */
  constructor(server, createRequest, listener, delay = () => 0) {
    this.server = server
    this.createRequest = createRequest
    this.listener = listener
    this.delay = delay
    /** @type {string | undefined} id of the active job */
    this.id = undefined
    /** Whether to start another job when the active one ends. */
    this.restart = false
    this.stopped = false
    /** Whether the server has taken the active job. */
    this.accepted = false
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined
    this.previewUrl = ''
  }

  /** Start a job after the delay, in place of the active one. Calls within the delay are merged. */
  schedule() {
    clearTimeout(this.timer)
    this.timer = setTimeout(() => this.start(), this.delay())
  }

  /** Cancel the active and the scheduled job. */
  stop() {
    clearTimeout(this.timer)
    this.restart = false
    this.stopped = true
    this.cancel()
  }

  /** Start a job now. If one is active, cancel it and start the new one when it has ended. */
  async start() {
    if (this.id) {
      this.restart = true
      await this.cancel()
      return
    }
    const id = uuid4()
    this.id = id
    this.stopped = false
    activeJobs.set(id, this)
    this.listener.onError('')
    this.listener.onProgress(0)
    try {
      const request = await this.createRequest()
      await post(this.server, '/prompt', { ...request, prompt_id: id, client_id: this.server.clientId })
      if (this.id !== id) return
      this.accepted = true
      if (this.restart || this.stopped) await this.cancel()
    } catch (error) {
      if (this.id === id) this.fail(error instanceof Error ? error.message : String(error))
    }
  }

  async cancel() {
    const id = this.id
    if (!id) return
    try {
      await post(this.server, '/jobs/cancel', { job_ids: [id] })
      // No event comes for a pending job that was canceled, or that somebody else has removed from the queue.
      const queued = await queuedJobIds(this.server)
      if (this.accepted && this.id === id && !queued.includes(id)) this.endCanceled(id)
    } catch (error) {
      this.listener.onError(error instanceof Error ? error.message : String(error))
    }
  }

  /** @param {string} id */
  endCanceled(id) {
    canceledJobs.add(id)
    this.end()
    deleteCanceledJobs(this.server)
  }

  /** Cancel a job that has just started if it is outdated: the server ignores a cancellation before the start. */
  onStart() {
    if (this.restart || this.stopped) this.cancel()
  }

  /** @param {string} message */
  fail(message) {
    this.listener.onError(message.trim())
    this.end()
  }

  /** Release the active job, and start another one if one is due. */
  end() {
    if (this.id) activeJobs.delete(this.id)
    this.id = undefined
    this.accepted = false
    URL.revokeObjectURL(this.previewUrl)
    this.listener.onProgress(1)
    if (this.restart) {
      this.restart = false
      this.start()
    }
  }

  /** @param {Blob} blob an encoded image */
  showPreview(blob) {
    URL.revokeObjectURL(this.previewUrl)
    this.previewUrl = URL.createObjectURL(blob)
    this.listener.onPreview(this.previewUrl)
  }
}

/**
 * Send a POST request with a JSON body. Throws an Error with the server's message if the response is not OK.
 * @param {{ fetchApi: (path: string, options?: RequestInit) => Promise<Response> }} server
 * @param {string} path
 * @param {object} content
 */
export async function post(server, path, content) {
  const headers = { 'Content-Type': 'application/json' }
  const response = await server.fetchApi(path, { method: 'POST', headers, body: JSON.stringify(content) })
  if (response.ok) return response
  const body = await response.json().catch(() => ({ error: `${response.status} ${response.statusText}` }))
  throw new Error(errorMessage(body))
}

/** URL of an image on the server. @param {{ apiURL: (path: string) => string }} server @param {ImageFile} file */
export function viewUrl(server, { filename, subfolder, type }) {
  return server.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`)
}

/**
 * The message of an error response, followed by the distinct errors of its nodes, one per line.
 * @param {object} body
 * @param {string | { message: string }} [body.error]
 * @param {Record<string, { errors: { details: string }[] }>} [body.node_errors] by node id
 */
function errorMessage({ error, node_errors: nodes }) {
  const details = Object.values(nodes ?? {}).flatMap(({ errors }) => errors.map(({ details }) => details))
  return [typeof error === 'object' ? error.message : error, ...new Set(details)].filter(Boolean).join('\n')
}

/** A random UUID. crypto.randomUUID is not available on pages that are not served over HTTPS. */
function uuid4() {
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  bytes[6] = (bytes[6] & 0x0f) | 0x40
  bytes[8] = (bytes[8] & 0x3f) | 0x80
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join('')
  return hex.replace(/(.{8})(.{4})(.{4})(.{4})(.{12})/, '$1-$2-$3-$4-$5')
}
