import { configDefaults, defineConfig } from 'vitest/config'

const cudaOps = 'test/cuda/ops/**/*.test.ts'
// Orders in which the emulator runs warps, blocks and streams. On a GPU they change nothing.
const schedules = process.env.MGM_TEST_FULL ? [1, 2, 3, 4, 5, 6, 7, 8] : [1, 2, 3]

export default defineConfig({
  test: {
    globalSetup: ['test/global-setup.ts'],
    // The cases of the full run are larger.
    testTimeout: process.env.MGM_TEST_FULL ? 300_000 : 60_000,
    hookTimeout: 60_000,
    // Native compute uses every core already; more workers than cores only adds noise.
    maxWorkers: 2,
    pool: 'forks',
    projects: [
      {
        extends: true,
        test: { name: 'main', include: ['test/**/*.test.ts'], exclude: [...configDefaults.exclude, cudaOps] },
      },
      ...schedules.map(seed => ({
        extends: true as const,
        test: {
          name: `cuda, schedule ${seed}`,
          include: [cudaOps],
          env: { MGM_EMULATOR_SEED: String(seed) },
        },
      })),
    ],
  },
})
