import { defineConfig } from 'vitest/config'

export default defineConfig({
  test: {
    include: ['test/**/*.test.ts'],
    globalSetup: ['test/global-setup.ts'],
    testTimeout: 60_000,
    hookTimeout: 60_000,
    // Native compute uses every core already; more workers than cores only adds noise.
    maxWorkers: 2,
    pool: 'forks',
  },
})
