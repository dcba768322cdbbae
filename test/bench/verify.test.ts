import { describe, expect, it } from 'vitest'
import { CASES, caseKey } from '../../bench/kernels/cases.ts'
import { markdown, slug, summarize, type Verification } from '../../bench/kernels/verify.ts'

describe('gpu:verify', () => {
  it('counts tests, and files that fail before their first', () => {
    const test = (fullName: string, status: string, failureMessages: string[] = []) => ({
      fullName,
      status,
      failureMessages,
    })
    const tests = summarize({
      testResults: [
        {
          name: 'a.test.ts',
          status: 'failed',
          assertionResults: [
            test('adds', 'passed'),
            test('copies', 'failed', ['AssertionError: 1\n    at x']),
            test('peers', 'pending'),
          ],
        },
        {
          name: 'b.test.ts',
          status: 'failed',
          message: 'no such import\nat y',
          assertionResults: [test('waits', 'skipped')],
        },
        { name: 'c.test.ts', status: 'passed', assertionResults: [test('c', 'passed')] },
      ],
    })
    expect(tests).toEqual({
      passed: 2,
      failed: 2,
      skipped: 2,
      failures: ['copies: AssertionError: 1', 'b.test.ts: no such import'],
    })
  })

  it('names a report after the card', () => {
    expect(slug('NVIDIA A100-SXM4-80GB')).toBe('nvidia-a100-sxm4-80gb')
    expect(slug('(odd) card ')).toBe('odd-card')
  })

  const [cast] = CASES.filter(one => one.op === 'cast')
  const [clip] = CASES.filter(one => one.op === 'attention')
  const spread = (median: number) => ({ median, min: median, max: median, count: 9 })
  const verification = (rehearsal: boolean): Verification => ({
    date: '2026-01-02T03:04:05Z',
    commit: 'abc',
    dirty: false,
    rehearsal,
    machine: {
      date: '',
      cpu: 'CPU',
      cores: 1,
      usable: 1,
      memoryGiB: 1,
      loadAverage: [],
      system: 'linux',
      node: 'v20',
    },
    survey: {
      error: null,
      library: 'libcuda.so.1',
      driverVersion: 12040,
      emulated: rehearsal,
      devices: [{ name: 'NVIDIA A10', capability: 86, memory: 24 * 2 ** 30, image: 'sm_86' }],
    },
    smi: [null, null],
    tests: { passed: 3, failed: 1, skipped: 0, failures: ['copies: wrong'] },
    limits: rehearsal ? { copy: null, gemm: null } : { copy: cast!.work.bytes * 1000, gemm: 1e12 },
    timed: rehearsal
      ? [{ key: caseKey(cast!), seconds: null, cold: true }]
      : [
          { key: caseKey(cast!), seconds: spread(0.002), cold: true },
          { key: caseKey(clip!), seconds: spread(0.001), cold: false },
          { key: caseKey(CASES[0]!), error: 'no kernel yet' },
        ],
    torch: rehearsal
      ? null
      : {
          about: 'PyTorch',
          limits: { copy: 1, gemm: 2e12 },
          timed: { [caseKey(clip!)]: [0.002, 0.002, 0.003] },
        },
  })

  it('judges times by the better of the measured limits, and by PyTorch', () => {
    const text = markdown(verification(false))
    expect(text).toMatch(/^# NVIDIA A10, 2026-01-02/)
    // Half of the copy rate; the GEMM rate is PyTorch's.
    expect(text).toMatch(/cast: .*\| +2\.00 ms \|.*\| +50 % \|/)
    const share = ((clip!.work.tensorFlops / 2e12 / 0.001) * 100).toFixed(0)
    expect(text).toMatch(
      new RegExp(`attention: .*\\(in L2\\) \\|.*\\| +${share} % \\| +2\\.00 ms \\| +2\\.00 \\|`),
    )
    expect(text).toContain('CUDA 12.4,')
    expect(text).toContain('no kernel yet')
    expect(text).toContain('3 passed, 1 failed, 0 skipped.\n- copies: wrong')
    expect(text).toContain('published of A10: 600.0 GB/s')
  })

  it('claims no time of an emulated device', () => {
    const text = markdown(verification(true))
    expect(text).toMatch(/^# REHEARSAL on an emulated device: no times, nothing verified/)
    expect(text.split('## Times')[1]).not.toMatch(/\d (ms|µs|s|GB\/s|TFLOP\/s) /)
    expect(text).toContain('ours –')
  })
})
