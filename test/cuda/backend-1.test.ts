import { cudaSuite } from './suite.ts'

cudaSuite('1')
