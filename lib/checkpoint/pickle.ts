import { describe } from '../errors.ts'
import { invalid, unsupported } from './errors.ts'

/** A Python tuple; lists are JS arrays, dicts are `PickleDict`. */
export class PickleTuple {
  readonly items: readonly unknown[]
  constructor(items: readonly unknown[]) {
    this.items = items
  }
}

/** A dict or OrderedDict. A Map, so that a key such as `__proto__` is only a key. */
export class PickleDict extends Map<string | number, unknown> {}

/** A name the pickle refers to. It is never looked up anywhere: it can only be compared. */
export class PickleGlobal {
  readonly name: string
  constructor(name: string) {
    this.name = name
  }
}

/** What the pickle may refer to, and what calling it means. */
export interface PickleHost {
  /** Whether `module.name` may be referred to. */
  allows(name: string): boolean
  /** The result of calling an allowed global. */
  call(name: string, args: readonly unknown[]): unknown
  /** The object of a persistent id. */
  load(id: unknown): unknown
}

const MARK = Symbol('mark')
/** Far above any state dict (ten a tensor), far below what a Map can hold. */
const MAX_MEMO = 2 ** 20

/**
 * Reads a pickle of protocol 2 to 5 without executing anything: containers, numbers, strings, and calls that `host`
 * answers itself. Time and memory are linear in `bytes`.
 * @throws MgmError `CHECKPOINT_INVALID` for malformed input, `CHECKPOINT_UNSUPPORTED` for names and opcodes outside that.
 */
export function unpickle(bytes: Uint8Array, host: PickleHost, file: string): unknown {
  return new Unpickler(bytes, host, file).run()
}

class Unpickler {
  readonly #bytes: Uint8Array
  readonly #view: DataView
  readonly #host: PickleHost
  readonly #file: string
  readonly #memo = new Map<number, unknown>()
  #stack: unknown[] = []
  #at = 0

  constructor(bytes: Uint8Array, host: PickleHost, file: string) {
    this.#bytes = bytes
    this.#view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength)
    this.#host = host
    this.#file = file
  }

  run(): unknown {
    if (this.#bytes[0] !== 0x80)
      throw unsupported(`expected a pickle of protocol 2 or later in ${this.#file}`)
    for (;;) {
      const opcode = this.#view.getUint8(this.#take(1))
      if (opcode === 0x2e) break // STOP
      this.#step(opcode)
    }
    const result = this.#pop()
    if (this.#stack.length > 0) throw this.#malformed('objects left on the stack')
    return result
  }

  #step(opcode: number): void {
    const push = (value: unknown) => this.#stack.push(value)
    switch (opcode) {
      case 0x80: {
        // PROTO
        const protocol = this.#u8()
        if (protocol < 2 || protocol > 5)
          throw unsupported(`expected pickle protocol 2 to 5 in ${this.#file} but received ${protocol}`)
        return
      }
      case 0x95: // FRAME: only a hint on buffering
        this.#take(8)
        return
      case 0x28: // MARK
        push(MARK)
        return
      case 0x30: // POP
        if (this.#stack.length === 0) throw this.#malformed('a pop from an empty stack')
        this.#stack.pop()
        return
      case 0x31: // POP_MARK
        this.#popMark()
        return
      case 0x32: // DUP
        push(this.#top())
        return
      case 0x4e: // NONE
        push(null)
        return
      case 0x88: // NEWTRUE
        push(true)
        return
      case 0x89: // NEWFALSE
        push(false)
        return
      case 0x4a: // BININT
        push(this.#view.getInt32(this.#take(4), true))
        return
      case 0x4b: // BININT1
        push(this.#u8())
        return
      case 0x4d: // BININT2
        push(this.#view.getUint16(this.#take(2), true))
        return
      case 0x8a: // LONG1
        push(this.#long(this.#u8()))
        return
      case 0x47: // BINFLOAT
        push(this.#view.getFloat64(this.#take(8), false))
        return
      case 0x58: // BINUNICODE
        push(this.#text(this.#u32()))
        return
      case 0x8c: // SHORT_BINUNICODE
        push(this.#text(this.#u8()))
        return
      case 0x8d: // BINUNICODE8
        push(this.#text(this.#u64()))
        return
      case 0x54: // BINSTRING
        push(this.#text(this.#u32()))
        return
      case 0x55: // SHORT_BINSTRING
        push(this.#text(this.#u8()))
        return
      case 0x42: // BINBYTES
        push(this.#slice(this.#u32()))
        return
      case 0x43: // SHORT_BINBYTES
        push(this.#slice(this.#u8()))
        return
      case 0x8e: // BINBYTES8
        push(this.#slice(this.#u64()))
        return
      case 0x5d: // EMPTY_LIST
        push([])
        return
      case 0x61: {
        // APPEND
        const item = this.#pop()
        this.#list().push(item)
        return
      }
      case 0x65: {
        // APPENDS
        const items = this.#popMark()
        const list = this.#list()
        for (const item of items) list.push(item)
        return
      }
      case 0x6c: // LIST
        push(this.#popMark())
        return
      case 0x29: // EMPTY_TUPLE
        push(new PickleTuple([]))
        return
      case 0x74: // TUPLE
        push(new PickleTuple(this.#popMark()))
        return
      case 0x85: // TUPLE1
      case 0x86: // TUPLE2
      case 0x87: {
        // TUPLE3
        const items: unknown[] = []
        for (let i = opcode; i >= 0x85; i--) items.unshift(this.#pop())
        push(new PickleTuple(items))
        return
      }
      case 0x7d: // EMPTY_DICT
        push(new PickleDict())
        return
      case 0x64: {
        // DICT
        const items = this.#popMark()
        push(new PickleDict())
        this.#setItems(items)
        return
      }
      case 0x73: {
        // SETITEM
        const value = this.#pop()
        this.#setItems([this.#pop(), value])
        return
      }
      case 0x75: // SETITEMS
        this.#setItems(this.#popMark())
        return
      case 0x68: // BINGET
        push(this.#recall(this.#u8()))
        return
      case 0x6a: // LONG_BINGET
        push(this.#recall(this.#u32()))
        return
      case 0x71: // BINPUT
        this.#remember(this.#u8())
        return
      case 0x72: // LONG_BINPUT
        this.#remember(this.#u32())
        return
      case 0x94: // MEMOIZE
        this.#remember(this.#memo.size)
        return
      case 0x63: {
        // GLOBAL
        const module = this.#line()
        push(this.#global(`${module}.${this.#line()}`))
        return
      }
      case 0x93: {
        // STACK_GLOBAL
        const name = this.#pop()
        const module = this.#pop()
        if (typeof name !== 'string' || typeof module !== 'string')
          throw this.#malformed('a name that is not text')
        push(this.#global(`${module}.${name}`))
        return
      }
      case 0x52: {
        // REDUCE
        const args = this.#pop()
        const callee = this.#pop()
        if (!(callee instanceof PickleGlobal) || !(args instanceof PickleTuple))
          throw this.#malformed('a call of a value')
        push(this.#host.call(callee.name, args.items))
        return
      }
      case 0x62: // BUILD: attributes such as a state dict's _metadata carry nothing that is needed
        this.#pop()
        if (!(this.#top() instanceof PickleDict))
          throw unsupported(`${this.#file} sets attributes of something that is not a dict`)
        return
      case 0x51: // BINPERSID
        push(this.#host.load(this.#pop()))
        return
      default:
        throw unsupported(
          `expected plain state-dict opcodes in ${this.#file} but received 0x${opcode.toString(16)} at ${this.#at - 1}`,
        )
    }
  }

  #take(count: number): number {
    const start = this.#at
    if (count > this.#bytes.length - start) throw this.#malformed(`${count} bytes missing at ${start}`)
    this.#at += count
    return start
  }

  #u8(): number {
    return this.#view.getUint8(this.#take(1))
  }

  #u32(): number {
    return this.#view.getUint32(this.#take(4), true)
  }

  #u64(): number {
    return Number(this.#view.getBigUint64(this.#take(8), true))
  }

  #slice(length: number): Uint8Array {
    const start = this.#take(length)
    return this.#bytes.subarray(start, start + length)
  }

  #text(length: number): string {
    try {
      return new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(this.#slice(length))
    } catch (error) {
      if (error instanceof TypeError) throw this.#malformed('text that is not UTF-8')
      throw error
    }
  }

  /** A two's complement little-endian integer. */
  #long(length: number): number {
    if (length > 8) throw this.#malformed(`an integer of ${length} bytes`)
    let value = 0n
    const bytes = this.#slice(length)
    for (let i = length - 1; i >= 0; i--) value = (value << 8n) | BigInt(bytes[i]!)
    const number = Number(BigInt.asIntN(Math.max(1, length * 8), value))
    if (!Number.isSafeInteger(number)) throw this.#malformed(`an integer beyond 53 bits`)
    return number
  }

  #line(): string {
    const end = this.#bytes.indexOf(0x0a, this.#at)
    if (end < 0 || end - this.#at > 1000) throw this.#malformed('a name without end')
    const line = this.#text(end - this.#at)
    this.#take(1)
    return line
  }

  #global(name: string): PickleGlobal {
    if (!this.#host.allows(name)) {
      throw unsupported(
        `${this.#file} refers to ${describe(name)}, which is no part of a plain state dict and is not executed; ` +
          'convert the file to safetensors',
      )
    }
    return new PickleGlobal(name)
  }

  #top(): unknown {
    const value = this.#stack.at(-1)
    if (this.#stack.length === 0 || value === MARK) throw this.#malformed('an operand missing')
    return value
  }

  #pop(): unknown {
    const value = this.#top()
    this.#stack.pop()
    return value
  }

  #popMark(): unknown[] {
    const at = this.#stack.lastIndexOf(MARK)
    if (at < 0) throw this.#malformed('no mark on the stack')
    const items = this.#stack.splice(at)
    items.shift()
    return items
  }

  #list(): unknown[] {
    const list = this.#top()
    if (!Array.isArray(list)) throw this.#malformed('an append to something that is not a list')
    return list
  }

  #setItems(items: readonly unknown[]): void {
    const dict = this.#top()
    if (!(dict instanceof PickleDict) || items.length % 2 !== 0)
      throw this.#malformed('items of something that is not a dict')
    for (let i = 0; i < items.length; i += 2) {
      const key = items[i]
      if (typeof key !== 'string' && typeof key !== 'number') {
        throw unsupported(
          `expected text or numbers for the keys of ${this.#file} but received ${describe(key)}`,
        )
      }
      dict.set(key, items[i + 1])
    }
  }

  #remember(index: number): void {
    if (this.#memo.size >= MAX_MEMO) throw this.#malformed(`more than ${MAX_MEMO} memo entries`)
    this.#memo.set(index, this.#top())
  }

  #recall(index: number): unknown {
    if (!this.#memo.has(index)) throw this.#malformed(`no memo entry ${index}`)
    return this.#memo.get(index)
  }

  #malformed(what: string): Error {
    return invalid(`expected a well-formed pickle in ${this.#file} but found ${what}`)
  }
}
