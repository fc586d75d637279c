// Runs jobs of our own, one at a time per queue: the newest state wins, nobody else's job is touched.

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

/** @param {Server} server */
export function listen(server) {
  const ours = (/** @type {CustomEvent} */ { detail }) => running.get(detail?.prompt_id ?? detail?.jobId)
  server.addEventListener('execution_start', (event) => ours(event)?.began())
  server.addEventListener('reconnected', () => [...running.values()].forEach((queue) => queue.ended()))
  for (const end of ['execution_success', 'execution_interrupted'])
    server.addEventListener(end, (event) => ours(event)?.ended())
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

export class OwnJobs {
  /**
   * @param {Server} server
   * @param {() => Promise<object | undefined>} body what to queue now, without prompt_id; undefined = nothing
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
    this.onServer = false
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
      if (!body) return this.ended()
      const content = JSON.stringify({ ...body, prompt_id: id, client_id: this.server.clientId })
      const answer = await this.server.fetchApi('/prompt', {
        method: 'POST',
        headers: { 'Content-Type': 'application/json' },
        body: content
      })
      if (!answer.ok) this.failed(reasons(await answer.json()))
      else if (this.dirty || this.unwanted) await this.cancel()
    } catch (error) {
      this.failed(error instanceof Error ? error.message : String(error))
    }
  }

  async cancel() {
    const id = this.id
    if (!id) return
    const answer = await this.server.fetchApi('/jobs/cancel', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json' },
      body: JSON.stringify({ job_ids: [id] })
    })
    const { cancelled } = answer.ok ? await answer.json() : { cancelled: false }
    // A job that had not begun ends without an event.
    if (cancelled && !this.onServer && this.id === id) this.ended()
  }

  began() {
    this.onServer = true
  }

  /** @param {string} message */
  failed(message) {
    this.listener.onError(message.trim())
    this.ended()
  }

  ended() {
    if (this.id) running.delete(this.id)
    this.id = undefined
    this.onServer = false
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

/** Where the page finds a picture. @param {{ apiURL: (path: string) => string }} server @param {File} file */
export function addressOf(server, { filename, subfolder, type }) {
  return server.apiURL(`/view?${new URLSearchParams({ filename, subfolder, type })}`)
}

/** @param {{ error?: { message: string }, node_errors?: Record<string, { errors: { details: string }[] }> }} refusal */
function reasons({ error, node_errors: nodes }) {
  const details = Object.values(nodes ?? {}).flatMap(({ errors }) => errors.map(({ details }) => details))
  return [error?.message ?? 'The graph was refused.', ...new Set(details)].join('\n')
}

/** A UUID; crypto.randomUUID is missing where the page does not come by https. */
function identifier() {
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  bytes[6] = (bytes[6] & 0x0f) | 0x40
  bytes[8] = (bytes[8] & 0x3f) | 0x80
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join('')
  return hex.replace(/(.{8})(.{4})(.{4})(.{4})(.{12})/, '$1-$2-$3-$4-$5')
}
