// The tokens of each phrase in each text encoder, as computed by the server.

import { post } from '../shared/job_runner.mjs'

/** @typedef {{ tokens: Record<string, string[]>, error: string }} PhraseTokens tokens: by text encoder */

const DEBOUNCE_MS = 400

export class TokenPreview {
  /**
   * @param {{ fetchApi: (path: string, options?: RequestInit) => Promise<Response> }} server
   * @param {() => void} onResponse called when `phrases` or `error` has changed
   */
  constructor(server, onResponse) {
    this.server = server
    this.onResponse = onResponse
    this.requested = ''
    /** @type {PhraseTokens[]} one per phrase of the last requested prompt; empty until the response is there */
    this.phrases = []
    this.error = ''
    /** @type {ReturnType<typeof setTimeout> | undefined} */
    this.timer = undefined
  }

  /**
   * Request the tokens of a prompt after a pause, unless they are those requested last.
   * @param {string} text
   * @param {string} mode
   */
  request(text, mode) {
    const request = JSON.stringify({ text, mode })
    if (request === this.requested) return
    this.requested = request
    this.phrases = []
    this.error = ''
    clearTimeout(this.timer)
    this.timer = setTimeout(() => this.fetch(request), DEBOUNCE_MS)
  }

  /** @param {string} request JSON */
  async fetch(request) {
    try {
      const response = await post(this.server, '/edit_sliders/tokens', JSON.parse(request))
      const { phrases } = await response.json()
      if (request !== this.requested) return
      this.phrases = phrases
      this.error = phrases.find((/** @type {PhraseTokens} */ phrase) => phrase.error)?.error ?? ''
    } catch (error) {
      if (request !== this.requested) return
      this.error = error instanceof Error ? error.message : String(error)
    }
    this.onResponse()
  }
}
