// Runs jobs of our own, one at a time per queue: the newest state wins, nobody else's job is touched.

import { t } from '../texts.mjs'

/**
 * @typedef {{ filename: string, subfolder: string, type: string }} File a picture on the server
 *
 * @typedef {object} Listener what is told of a run
 * @property {(files: File[], node: string) => void} onPictures what a node of the job has saved or previewed
 * @property {(address: string) => void} onPreview a picture on its way
 * @property {(share: number) => void} onProgress 0 to 1; 1 when nothing runs
 * @property {(message: string) => void} onError
 *
 * @typedef {object} Server what it asks of ComfyUI's frontend
 * @property {(path: string, options?: RequestInit) => Promise<Response>} fetchApi
 * @property {(path: string) => string} apiURL
 * @property {(type: any, listener: (event: any) => void) => void} addEventListener
 * @property {string} [clientId]
 */

/** @type {Map<string, OwnJobs>} our jobs that have not ended, by their id */
const running = new Map()

/** @type {Set<string>} jobs that we have cancelled and the server may still write into its history */
const dropped = new Set()

/** @param {Server} server */
export function listen(server) {
  const ours = (/** @type {CustomEvent} */ { detail }) => running.get(detail?.prompt_id ?? detail?.jobId)
  server.addEventListener('execution_start', (event) => ours(event)?.began())
  server.addEventListener('reconnected', () => endLost(server))
  server.addEventListener('status', () => forgetDropped(server))
  server.addEventListener('execution_success', (event) => ours(event)?.ended())
  server.addEventListener('execution_interrupted', (event) => {
    const queue = ours(event)
    if (!queue) return
    queue.ended()
    dropped.add(event.detail.prompt_id)
    forgetDropped(server)
  })
  server.addEventListener('execution_error', (event) => ours(event)?.failed(event.detail.exception_message))
  server.addEventListener('executed', (event) => {
    const { output, node } = event.detail
    if (output?.images) ours(event)?.listener.onPictures(output.images, node)
  })
  server.addEventListener('b_preview_with_metadata', (event) => ours(event)?.preview(event.detail.blob))
  server.addEventListener('progress_state', (event) => {
    const nodes = Object.values(event.detail.nodes ?? {})
    const [active] = nodes.filter(({ state }) => state === 'running')
    if (active) ours(event)?.listener.onProgress(active.value / active.max)
  })
}

/** After a lost connection: end what the server does not have any more. @param {Server} server */
async function endLost(server) {
  const kept = await jobsOf(server).catch(() => /** @type {string[]} */ ([]))
  for (const [id, queue] of running) if (!kept.includes(id)) queue.failed(t('connectionLost'))
}

/** Take our dropped jobs out of the history: they are no news. One that has not left the queue is written there later. */
async function forgetDropped(/** @type {Server} */ server) {
  if (!dropped.size) return
  const left = await jobsOf(server).catch(() => [...dropped])
  const over = [...dropped].filter((id) => !left.includes(id))
  if (!over.length) return
  for (const id of over) dropped.delete(id)
  post(server, '/history', { delete: over }).catch(() => {})
}

/** Ids of what runs and waits on the server. @param {Server} server @returns {Promise<string[]>} */
async function jobsOf(server) {
  const { queue_running: first, queue_pending: later } = await (await server.fetchApi('/queue')).json()
  return [...first, ...later].map(([, id]) => id)
}

export class OwnJobs {
  /**
   * @param {Server} server
   * @param {() => Promise<object>} body what to queue now, without prompt_id
   * @param {Listener} listener
   * @param {() => number} [delay] milliseconds from the last change to its run
   */
  constructor(server, body, listener, delay = () => 0) {
    this.server = server
    this.body = body
    this.listener = listener
    this.delay = delay
    /** @type {string | undefined} */
    this.id = undefined
    this.dirty = false
    this.unwanted = false
    this.accepted = false
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined
    this.shown = ''
  }

  /** The state has changed: run it soon, instead of what runs now. */
  changed() {
    clearTimeout(this.timer)
    this.timer = setTimeout(() => this.start(), this.delay())
  }

  /** Run nothing more, and cancel our own job. */
  stop() {
    clearTimeout(this.timer)
    this.dirty = false
    this.unwanted = true
    this.cancel()
  }

  async start() {
    if (this.id) {
      this.dirty = true
      await this.cancel()
      return
    }
    const id = identifier()
    this.id = id
    this.unwanted = false
    running.set(id, this)
    this.listener.onError('')
    this.listener.onProgress(0)
    try {
      const body = await this.body()
      await post(this.server, '/prompt', { ...body, prompt_id: id, client_id: this.server.clientId })
      if (this.id !== id) return
      this.accepted = true
      if (this.dirty || this.unwanted) await this.cancel()
    } catch (error) {
      if (this.id === id) this.failed(error instanceof Error ? error.message : String(error))
    }
  }

  async cancel() {
    const id = this.id
    if (!id) return
    try {
      await post(this.server, '/jobs/cancel', { job_ids: [id] })
      // A job that had not begun ends without an event, and so does one that somebody else took out of the queue.
      const left = await jobsOf(this.server)
      if (this.accepted && this.id === id && !left.includes(id)) this.drop(id)
    } catch (error) {
      this.listener.onError(error instanceof Error ? error.message : String(error))
    }
  }

  /** @param {string} id */
  drop(id) {
    dropped.add(id)
    this.ended()
    forgetDropped(this.server)
  }

  /** The server forgets what it was told of a job before it began. */
  began() {
    if (this.dirty || this.unwanted) this.cancel()
  }

  /** @param {string} message */
  failed(message) {
    this.listener.onError(message.trim())
    this.ended()
  }

  ended() {
    if (this.id) running.delete(this.id)
    this.id = undefined
    this.accepted = false
    URL.revokeObjectURL(this.shown)
    this.listener.onProgress(1)
    if (this.dirty) {
      this.dirty = false
      this.start()
    }
  }

  /** @param {Blob} blob */
  preview(blob) {
    URL.revokeObjectURL(this.shown)
    this.shown = URL.createObjectURL(blob)
    this.listener.onPreview(this.shown)
  }
}

/**
 * Send JSON. Throws an error with the server's reasons if it refuses.
 * @param {{ fetchApi: (path: string, options?: RequestInit) => Promise<Response> }} server
 * @param {string} path
 * @param {object} content
 */
export async function post(server, path, content) {
  const headers = { 'Content-Type': 'application/json' }
  const answer = await server.fetchApi(path, { method: 'POST', headers, body: JSON.stringify(content) })
  if (answer.ok) return answer
  throw new Error(reasons(await answer.json().catch(() => ({ error: `${answer.status} ${answer.statusText}` }))))
}

/** Where the page finds a picture. @param {{ apiURL: (path: string) => string }} server @param {File} file */
export function addressOf(server, { filename, subfolder, type }) {
  return server.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`)
}

/** @param {{ error?: string | { message: string }, node_errors?: Record<string, { errors: { details: string }[] }> }} no */
function reasons({ error, node_errors: nodes }) {
  const details = Object.values(nodes ?? {}).flatMap(({ errors }) => errors.map(({ details }) => details))
  return [typeof error === 'object' ? error.message : error, ...new Set(details)].filter(Boolean).join('\n')
}

/** A UUID; crypto.randomUUID is missing where the page does not come by https. */
function identifier() {
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  bytes[6] = (bytes[6] & 0x0f) | 0x40
  bytes[8] = (bytes[8] & 0x3f) | 0x80
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join('')
  return hex.replace(/(.{8})(.{4})(.{4})(.{4})(.{12})/, '$1-$2-$3-$4-$5')
}
