import { readFileSync } from 'node:fs'

/** What the packaging tests need of a 64-bit little-endian ELF shared library. */
export interface Elf {
  /** DT_NEEDED: libraries it asks the loader for. */
  needed: string[]
  symbols: ElfSymbol[]
}

export interface ElfSymbol {
  name: string
  defined: boolean
  weak: boolean
  /** Symbol version it requires, e.g. `GLIBC_2.17`; undefined where it has none. */
  version: string | undefined
}

const SHT_DYNAMIC = 6
const SHT_DYNSYM = 11
const SHT_GNU_VERNEED = 0x6ffffffe
const SHT_GNU_VERSYM = 0x6fffffff
const DT_NEEDED = 1n

/** Reads the dynamic symbols, their versions and the needed libraries, from the section table. */
export function readElf(path: string): Elf {
  const file = readFileSync(path)
  if (file.readUInt32BE(0) !== 0x7f454c46 || file[4] !== 2 || file[5] !== 1)
    throw new Error(`${path} is not a 64-bit little-endian ELF file`)
  const sectionOffset = Number(file.readBigUInt64LE(0x28))
  const sectionSize = file.readUInt16LE(0x3a)
  const sections = Array.from({ length: file.readUInt16LE(0x3c) }, (_, index) => {
    const at = sectionOffset + index * sectionSize
    const offset = Number(file.readBigUInt64LE(at + 0x18))
    const size = Number(file.readBigUInt64LE(at + 0x20))
    return {
      type: file.readUInt32LE(at + 4),
      link: file.readUInt32LE(at + 0x28),
      info: file.readUInt32LE(at + 0x2c),
      bytes: file.subarray(offset, offset + size),
    }
  })
  const section = (type: number) => {
    const found = sections.find(candidate => candidate.type === type)
    if (!found) throw new Error(`${path} has no section of type ${type}`)
    return found
  }
  const text = (table: Buffer, at: number): string => table.toString('latin1', at, table.indexOf(0, at))

  const dynamic = section(SHT_DYNAMIC)
  const strings = sections[dynamic.link]!.bytes
  const needed: string[] = []
  for (let at = 0; at < dynamic.bytes.length; at += 16)
    if (dynamic.bytes.readBigInt64LE(at) === DT_NEEDED)
      needed.push(text(strings, Number(dynamic.bytes.readBigUInt64LE(at + 8))))

  const versionNames = new Map<number, string>()
  const verneed = section(SHT_GNU_VERNEED)
  for (let entry = 0, at = 0; entry < verneed.info; entry++) {
    const count = verneed.bytes.readUInt16LE(at + 2)
    for (let aux = at + verneed.bytes.readUInt32LE(at + 8), i = 0; i < count; i++) {
      const name = text(sections[verneed.link]!.bytes, verneed.bytes.readUInt32LE(aux + 8))
      versionNames.set(verneed.bytes.readUInt16LE(aux + 6) & 0x7fff, name)
      aux += verneed.bytes.readUInt32LE(aux + 12)
    }
    at += verneed.bytes.readUInt32LE(at + 12)
  }

  const versym = section(SHT_GNU_VERSYM).bytes
  const dynsym = section(SHT_DYNSYM)
  const symbols: ElfSymbol[] = []
  for (let index = 1; index * 24 < dynsym.bytes.length; index++) {
    const at = index * 24
    symbols.push({
      name: text(sections[dynsym.link]!.bytes, dynsym.bytes.readUInt32LE(at)),
      defined: dynsym.bytes.readUInt16LE(at + 6) !== 0,
      weak: dynsym.bytes[at + 4]! >> 4 === 2,
      version: versionNames.get(versym.readUInt16LE(index * 2) & 0x7fff),
    })
  }
  return { needed, symbols }
}
