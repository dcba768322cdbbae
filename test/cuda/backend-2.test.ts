import { cudaSuite } from './suite.ts'

cudaSuite('2')
