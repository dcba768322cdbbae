type Props = Readonly<Record<string, string | boolean | ((event: Event) => void)>>

/** An element with attributes, listeners (functions, by the name of the event) and children. */
export function make<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  props: Props = {},
  ...children: (Node | string)[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag)
  for (const [name, value] of Object.entries(props))
    if (typeof value === 'function') element.addEventListener(name, value)
    else element.toggleAttribute(name, value !== false) && element.setAttribute(name, String(value))
  element.append(...children)
  return element
}

/** The element of index.html with an id. */
export function get<T extends HTMLElement = HTMLElement>(id: string): T {
  const element = document.getElementById(id)
  if (!element) throw new Error(`the page has no #${id}`)
  return element as T
}
