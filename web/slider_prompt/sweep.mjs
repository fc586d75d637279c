// Sweeps of a Slider Prompt: renders them, keeps their results per workflow, and shows them in the node.

import { api } from '../../../scripts/api.js'
import { app } from '../../../scripts/app.js'
import { sweepGraph } from '../shared/api_graph.mjs'
import { isInGraph, locatorId } from '../shared/dom_widget.mjs'
import { LatestJobRunner, post, viewUrl } from '../shared/job_runner.mjs'
import { t } from '../shared/texts.mjs'
import { Filmstrip, readSweep, SweepResult } from './filmstrip.mjs'
import { queuedGraph, sliderPromptIds } from './queued_graph.mjs'

/** @import { Format, Sweep } from './filmstrip.mjs' */
/** @import { Phrase } from './phrases.mjs' */
/** @import { View } from './view.mjs' */

/**
 * @typedef {object} Sliders what a sweep needs from its Slider Prompt
 * @property {LGraphNode} node
 * @property {View} view
 * @property {Phrase[]} phrases one per visible slider
 * @property {(slider: number) => boolean} isStrengthLinked
 * @property {(strengths: [number, number][]) => void} setStrengths pairs of slider index and strength
 * @property {(fraction: number) => void} showProgress
 * @property {() => void} refresh
 */

const HEIGHT_WITH_FILMSTRIP = 720

/** @type {WeakMap<object, Map<string, SweepResult>>} workflow -> locator id of the node -> its last sweep */
const results = new WeakMap()

/** Key of the active workflow in `results`. */
const activeWorkflow = () => app.extensionManager.workflow.activeWorkflow ?? app

/** Stop and delete the sweeps of the active workflow, which was cleared: new nodes may get the ids of the old ones. */
export function clearSweeps() {
  const cleared = results.get(activeWorkflow())
  for (const result of cleared?.values() ?? []) result.stop()
  cleared?.clear()
}

export class SweepPanel {
  /** @param {Sliders} sliders */
  constructor(sliders) {
    this.sliders = sliders
    /** @type {SweepResult | undefined} */
    this.shownResult = undefined
    this.filmstrip = new Filmstrip({
      render: () => this.render(),
      stop: () => this.result?.stop(),
      setSweep: (sweep) => {
        this.sweep = sweep
        this.sliders.refresh()
      },
      select: (result) => this.showSelectedImage(result),
      applyStrengths: (result) => this.applyStrengths(result),
      save: (result, format) => this.save(result, format),
      imageUrl: (file) => viewUrl(api, file)
    })
  }

  /**
   * The results of the active workflow. They are kept outside the nodes, since undo and switching workflows create new
   * nodes with the same ids.
   */
  get workflowResults() {
    const workflow = activeWorkflow()
    if (!results.has(workflow)) results.set(workflow, new Map())
    return /** @type {Map<string, SweepResult>} */ (results.get(workflow))
  }

  get result() {
    const { node } = this.sliders
    return isInGraph(node) ? this.workflowResults.get(locatorId(node)) : undefined
  }

  /** The sweep that the form shows. It is saved with the workflow. @returns {Sweep} */
  get sweep() {
    return readSweep(this.sliders.node.properties.sweep)
  }

  set sweep({ axes, batchSize }) {
    this.sliders.node.properties.sweep = /** @type {any} */ ({ axes, atOnce: batchSize })
  }

  refresh() {
    const phrases = this.sliders.phrases.map(({ text }) => text)
    this.filmstrip.show({ sweep: this.sweep, phrases, result: this.shownResult })
  }

  /** Show the node's result in the active workflow, if it is not the shown one. */
  update() {
    const { result } = this
    if (result === this.shownResult) return
    if (this.shownResult) this.sliders.view.clear()
    this.shownResult = result
    if (result) {
      result.onChange = () => this.result === result && this.show(result)
      this.show(result)
    } else this.refresh()
  }

  /** @param {SweepResult} result */
  show(result) {
    if (result.error) this.sliders.view.runError.textContent = result.error
    this.sliders.showProgress(result.progress)
    this.showSelectedImage(result)
  }

  /** @param {SweepResult} result */
  showSelectedImage(result) {
    const file = result.files[result.selected]
    if (file) this.sliders.view.image.src = viewUrl(api, file)
    this.refresh()
  }

  /**
   * Set the swept sliders to the strengths of the selected image. Sliders are found by their phrases, which may have
   * moved since the sweep.
   * @param {SweepResult} result
   */
  applyStrengths(result) {
    const { phrases } = this.sliders
    const sliders = result.axes.map(({ slider }, k) =>
      phrases[slider]?.text === result.phrases[k] ? slider : phrases.findIndex(({ text }) => text === result.phrases[k])
    )
    this.sliders.setStrengths(sliders.map((slider, k) => [slider, result.strengths[result.selected][k]]))
  }

  /** Start the sweep, in place of one that runs; or show why it cannot be rendered. */
  render() {
    const { node, view, phrases } = this.sliders
    const { axes, batchSize } = this.sweep
    const error = axes.map(({ slider }) => this.sweepError(slider)).find(Boolean)
    if (error) {
      view.runError.textContent = error
      return
    }
    this.result?.stop()
    const result = new SweepResult(
      axes,
      axes.map(({ slider }) => phrases[slider].text)
    )
    view.clear()
    this.workflowResults.set(locatorId(node), result)
    if (node.size[1] < HEIGHT_WITH_FILMSTRIP) node.setSize([node.size[0], HEIGHT_WITH_FILMSTRIP])
    renderSweep(result, node, batchSize)
    this.update()
    this.sliders.refresh()
  }

  /** Why a slider cannot be swept; empty if it can. @param {number} slider */
  sweepError(slider) {
    const { phrases } = this.sliders
    if (slider >= phrases.length) return t('noSuchSlider', slider + 1, phrases.length)
    return this.sliders.isStrengthLinked(slider) ? t('sliderLinked', slider + 1) : ''
  }

  /** Download the images as one file. @param {SweepResult} result @param {Format} format */
  async save(result, format) {
    const { files: frames, columns, heading, metadata } = result
    const captions = frames.map((_, k) => result.caption(k))
    const request = { format, frames, captions, columns, heading, metadata }
    const response = await post(api, '/edit_sliders/sweep_file', request).catch((error) => {
      this.sliders.view.runError.textContent = error.message
    })
    if (!response) return
    const link = document.createElement('a')
    link.href = URL.createObjectURL(await response.blob())
    link.download = format === 'webp' ? 'sweep.webp' : `sweep_${format}.png`
    link.click()
    URL.revokeObjectURL(link.href)
  }
}

/**
 * Render all images of a sweep in one job.
 * @param {SweepResult} result receives the images
 * @param {LGraphNode} node the Slider Prompt
 * @param {number} batchSize
 */
function renderSweep(result, node, batchSize) {
  /** @type {string[]} ids of the preview nodes, one per batch */
  let previews = []
  const jobs = new LatestJobRunner(
    api,
    async () => {
      const { graph, workflow, definitions } = await queuedGraph()
      const swept = sweepGraph(graph, sliderPromptIds(graph, node)[0], definitions, result.axes, batchSize)
      if (!swept) throw new Error(t('nothingToRun'))
      previews = swept.targets
      result.metadata = { workflow: JSON.stringify(workflow), prompt: JSON.stringify(graph) }
      const { graph: prompt, targets: partial_execution_targets } = swept
      return { prompt, partial_execution_targets, extra_data: { extra_pnginfo: { workflow } } }
    },
    {
      onImages: (files, nodeId) => {
        const first = previews.indexOf(nodeId) * batchSize
        if (first < 0) return
        const expected = Math.min(batchSize, result.files.length - first)
        if (files.length !== expected) result.error = t('wrongImageCount', files.length, expected)
        else files.forEach((file, k) => (result.files[first + k] = file))
        if (!result.files[result.selected]) result.selected = first
        result.onChange()
      },
      onPreview: () => {},
      onProgress: (fraction) => {
        const done = result.files.filter(Boolean).length / result.files.length
        result.progress = fraction < 1 ? Math.min(done + (fraction * batchSize) / result.files.length, 0.99) : 1
        result.onChange()
      },
      onError: (message) => {
        result.error = message
        result.onChange()
      }
    }
  )
  result.stop = () => jobs.stop()
  jobs.start()
}
