import * as z from 'zod'
import { describe } from '../errors.ts'
import { invalid } from './errors.ts'

// Words of the config schemas. A key may be absent or null.
export const int = (min: number, max: number) => z.int().min(min).max(max)
export const size = (max: number) => int(1, max)
export const optional = <T extends z.ZodType>(schema: T) => schema.nullish()
export const withDefault = <T extends z.ZodType>(schema: T, value: z.output<T>) =>
  schema.nullish().transform(v => (v ?? value) as NonNullable<z.output<T>>)
export const flag = (value: boolean) => withDefault(z.boolean(), value)
export const orNull = <T extends z.ZodType>(schema: T) =>
  schema.nullish().transform(v => (v ?? null) as z.output<T> | null)
export const text = z.string().max(4096)
export const positive = z.number().positive().max(1e12)

/** Runs a schema and words its first complaints as `expected … for … in <file> but received …`. */
export function parseWith<T extends z.ZodType>(schema: T, json: unknown, file: string): z.output<T> {
  const result = schema.safeParse(json)
  if (result.success) return result.data
  const complaints = result.error.issues.slice(0, 3).map(issue => {
    const name = issue.path.length > 0 ? `"${issue.path.join('.')}"` : 'the file'
    return `expected ${wanted(issue)} for ${name} in ${file} but received ${describe(valueAt(json, issue.path))}`
  })
  throw invalid(complaints.join('; '))
}

type Issue = z.core.$ZodIssue

function wanted(issue: Issue): string {
  switch (issue.code) {
    case 'invalid_type':
      return issue.expected === 'int' ? 'an integer' : `a value of type ${issue.expected}`
    case 'invalid_value':
      return `one of ${issue.values.map(v => describe(v)).join(', ')}`
    case 'too_small':
      return `${issue.inclusive ? 'at least' : 'more than'} ${issue.minimum}`
    case 'too_big':
      return `at most ${issue.maximum}`
    case 'invalid_union':
      return issue.errors.map(errors => (errors[0] ? wanted(errors[0]) : 'another value')).join(' or ')
    default:
      return 'another value'
  }
}

function valueAt(json: unknown, path: readonly PropertyKey[]): unknown {
  let value = json
  for (const key of path) {
    if (typeof value !== 'object' || value === null || !Object.hasOwn(value, key)) return undefined
    value = (value as Record<PropertyKey, unknown>)[key]
  }
  return value
}
