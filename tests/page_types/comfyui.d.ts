// The modules that ComfyUI serves to page extensions, by their URLs, and short names for some of its types.

declare module '*/scripts/app.js' {
  export const app: import('@comfyorg/comfyui-frontend-types').ComfyApp
}

declare module '*/scripts/api.js' {
  export const api: import('@comfyorg/comfyui-frontend-types').ComfyApi
}

type ComfyExtension = import('@comfyorg/comfyui-frontend-types').ComfyExtension
type LGraphNode = Parameters<NonNullable<ComfyExtension['nodeCreated']>>[0] & {
  onExecuted?(output: { text?: string[] }): void
}
type NodeWithDOMWidgets = LGraphNode & {
  addDOMWidget(name: string, type: string, element: HTMLElement, options: object): Widget
}
type Widget = NonNullable<LGraphNode['widgets']>[number]
type TextAreaWidget = Widget & { element: HTMLTextAreaElement }
