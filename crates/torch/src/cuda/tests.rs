//! The kernels on a processor, and on a GPU where there is one, against tensor operations in float64.

use std::sync::OnceLock;

use tch::{Device, Kind, Tensor};

use super::*;
use crate::testing::{self, difference, wide};
use crate::{BLOCK_TOKENS, BlockRun, Drawn, Filters};

const S: i64 = BLOCK_TOKENS as i64;

/// Kernels of shapes that take every way through the text: parts of a warp and several a lane, groups of every size, groups
/// in parts. First those of the emulator, then those of a GPU.
pub(super) fn every_kernel() -> &'static [DeviceKernels] {
    static KERNELS: OnceLock<Vec<DeviceKernels>> = OnceLock::new();
    KERNELS.get_or_init(|| {
        let shapes = [
            (Kind::Float, 6, 2, 24),
            (Kind::Float, 3, 3, 64),
            (Kind::BFloat16, 14, 2, 64),
            (Kind::BFloat16, 24, 2, 128),
            (Kind::Float, 4, 4, 16),
        ];
        let shapes = shapes.map(|(kind, heads, kv_heads, head_dim)| KernelShape { kind, heads, kv_heads, head_dim });
        let mut found = Vec::new();
        for shape in shapes {
            match DeviceKernels::emulated(shape) {
                Ok(kernels) => found.push(kernels),
                Err(KernelError::NoCompiler { problems }) => {
                    eprintln!("skipped: no C++ compiler ({problems}); CXX names one");
                    break;
                }
                Err(error) => panic!("{error}"),
            }
        }
        match testing::gpu() {
            Ok(gpu) => found.extend(shapes.map(|shape| DeviceKernels::load(shape, *gpu).expect("a GPU has kernels"))),
            Err(error) => eprintln!("emulated alone: {error}"),
        }
        found
    })
}

/// Kernels of one shape, of each machine.
pub(super) fn each_machine() -> impl Iterator<Item = &'static DeviceKernels> {
    let of_shape = every_kernel().first().map(DeviceKernels::shape);
    every_kernel().iter().filter(move |kernels| Some(kernels.shape()) == of_shape)
}

impl DeviceKernels {
    /// Where the tensors have to be.
    pub(super) fn device(&self) -> Device {
        self.machine.device()
    }

    /// Logits: they are float32 whatever the kind.
    pub(super) fn random_logits(&self, size: &[i64]) -> Tensor {
        testing::random(size, Kind::Float).to_device(self.device())
    }

    /// Numbers in the kind and the place of the kernels.
    pub(super) fn random(&self, size: &[i64]) -> Tensor {
        testing::random(size, self.kind()).to_device(self.device())
    }
}

pub(super) fn tolerance(kind: Kind) -> f64 {
    if kind == Kind::BFloat16 { 1e-2 } else { 1e-5 }
}

pub(super) fn normed(x: &Tensor, weight: &Tensor) -> Tensor {
    let scale = (x.square().mean_dim(-1, true, Kind::Double) + 1e-6).rsqrt();
    x * scale * wide(weight)
}

#[test]
fn norms_and_gates_equal_those_of_tensors() {
    tch::manual_seed(1);
    for kernels in every_kernel() {
        let kind = kernels.shape().kind;
        for (rows, width) in [(1, 2), (3, 24), (2, 100), (5, 896), (1, 5120)] {
            let [x, y] = [(); 2].map(|()| kernels.random(&[rows, width]));
            let weight = kernels.random(&[width]);
            let (sum, output) = kernels.add_rms_norm(&x, Some(&y), &weight, 1e-6).expect("runs");
            assert!(difference(&sum, &(wide(&x) + wide(&y))) < tolerance(kind));
            // The norm is of the sum as it is kept.
            assert!(difference(&output, &normed(&wide(&sum), &weight)) < tolerance(kind), "{kind:?} {rows} x {width}");
            let (same, output) = kernels.add_rms_norm(&x, None, &weight, 1e-6).expect("runs");
            assert!(same.equal(&x) && difference(&output, &normed(&wide(&x), &weight)) < tolerance(kind));
            let found = kernels.silu_gate(&kernels.random(&[rows, 2 * width])).expect("runs");
            assert_eq!(found.size(), [rows, width]);
            let gate_up = kernels.random(&[rows, 2 * width]) * 3.0;
            let parts = wide(&gate_up).chunk(2, -1);
            let found = kernels.silu_gate(&gate_up).expect("runs");
            assert!(difference(&found, &(parts[0].silu() * &parts[1])) < tolerance(kind));
        }
        // A row that begins at an odd element is read one by one.
        let odd = kernels.random(&[8 * 16 + 1]).narrow(0, 1, 8 * 16).view([8, 16]);
        let weight = kernels.random(&[16]);
        let (_, output) = kernels.add_rms_norm(&odd, None, &weight, 1e-6).expect("runs");
        assert!(difference(&output, &normed(&wide(&odd), &weight)) < tolerance(kind));
    }
}

#[test]
fn heads_are_normed_turned_and_stored() {
    tch::manual_seed(2);
    for kernels in every_kernel() {
        let KernelShape { kind, heads, kv_heads, head_dim } = kernels.shape();
        let [n, k, h] = [heads, kv_heads, head_dim].map(|size| size as i64);
        let tokens = 5;
        let slots = [(3u32, 0u32), (3, 1), (0, 31), (2, 7), (1, 16)];
        for norms in [false, true] {
            let projected = kernels.random(&[tokens, n + 2 * k, h]);
            let weights = [kernels.random(&[h]), kernels.random(&[h])];
            let angles = Tensor::randn([tokens, h / 2], (Kind::Float, kernels.device())) * 10.0;
            let (cos, sin) = (angles.cos(), angles.sin());
            let unset = |size: [i64; 4]| Tensor::full(size, f64::NAN, (kind, kernels.device()));
            let (mut keys, mut values) = (unset([4, k, h, S]), unset([4, k, S, h]));
            let given = norms.then_some((&weights[0], &weights[1], 1e-6));
            let places = DecodeSlots::new(&slots, kernels.device());
            let (q, rotated) =
                kernels.rotate_store(&projected, given, (&cos, &sin), &places, (&mut keys, &mut values)).expect("runs");
            let parts = wide(&projected).split_with_sizes([n, k, k], 1);
            let turned = |x: &Tensor, weight: &Tensor| {
                let x = if norms { normed(x, weight) } else { x.shallow_clone() };
                let halves = x.chunk(2, -1);
                let (c, s) = (wide(&cos).unsqueeze(1), wide(&sin).unsqueeze(1));
                Tensor::cat(&[&halves[0] * &c - &halves[1] * &s, &halves[1] * &c + &halves[0] * &s], -1)
            };
            assert!(difference(&q, &turned(&parts[0], &weights[0])) < tolerance(kind), "{:?}", kernels.shape());
            assert!(difference(&rotated, &turned(&parts[1], &weights[1])) < tolerance(kind));
            for (token, (block, place)) in (0..).zip(slots) {
                let (block, place) = (i64::from(block), i64::from(place));
                let key = keys.get(block).narrow(-1, place, 1).squeeze_dim(-1);
                assert!(key.equal(&rotated.get(token)), "the key of token {token}");
                let value = values.get(block).narrow(1, place, 1).squeeze_dim(1);
                assert!(value.equal(&projected.get(token).narrow(0, n + k, k)), "the value of token {token}");
            }
            for cache in [&keys, &values] {
                let written = cache.isfinite().to_kind(Kind::Int64).sum(Kind::Int64).int64_value(&[]);
                assert_eq!(written, tokens * k * h, "nothing else is written");
            }
        }
    }
}

/// Blocks of rows that share prompts, in no order; everything that is not written is not a number.
#[test]
fn attention_over_blocks_equals_that_of_each_row_alone() {
    tch::manual_seed(3);
    let own: Vec<u32> = (20..60).rev().collect();
    let prompt: Vec<u32> = (7..19).collect();
    // Prompt blocks and tokens, own blocks and tokens. Those of one batch are computed together.
    type Row<'a> = (&'a [u32], usize, &'a [u32], usize);
    let batches: [&[Row<'_>]; 4] = [
        &[(&[4, 0], 40, &[6, 1], 33), (&[4, 0], 40, &[3], 1), (&[], 0, &[5, 2, 61], 96)],
        &[(&prompt, 12 * 32 - 5, &own, 39 * 32 + 1)],
        &[(&prompt, 370, &own[..30], 930), (&[0], 1, &[], 0)],
        &[(&[2], 32, &[], 0)],
    ];
    for kernels in every_kernel() {
        let KernelShape { kind, heads, kv_heads, head_dim } = kernels.shape();
        let [n, k, h] = [heads, kv_heads, head_dim].map(|size| size as i64);
        for batch in batches {
            let unset = |size: [i64; 4]| Tensor::full(size, f64::NAN, (kind, kernels.device()));
            let (keys, values) = (unset([62, k, h, S]), unset([62, k, S, h]));
            let fill = |blocks: &[u32], tokens: usize| {
                for (block, place) in blocks.iter().zip((0..tokens).step_by(BLOCK_TOKENS)) {
                    let (block, tokens) = (i64::from(*block), (tokens - place).min(BLOCK_TOKENS) as i64);
                    keys.get(block).narrow(-1, 0, tokens).copy_(&kernels.random(&[k, h, tokens]));
                    values.get(block).narrow(1, 0, tokens).copy_(&kernels.random(&[k, tokens, h]));
                }
            };
            for (prompt, prompt_tokens, own, own_tokens) in batch {
                fill(prompt, *prompt_tokens);
                fill(own, *own_tokens);
            }
            let run = |blocks, tokens| BlockRun { blocks, tokens };
            let rows: Vec<_> = batch.iter().map(|row| [run(row.0, row.1), run(row.2, row.3)]).collect();
            let q = kernels.random(&[rows.len() as i64, n, h]);
            let table = DecodeTable::new(&rows, kernels.device());
            let found = kernels.attend_blocks(&q, &keys, &values, &table).expect("runs");
            for (place, row) in rows.iter().enumerate() {
                let expected = attended(&q.get(place as i64), &keys, &values, row);
                let apart = difference(&found.get(place as i64), &expected.view([-1]));
                assert!(apart < tolerance(kind), "{:?}, row {place} of {}: {apart}", kernels.shape(), rows.len());
            }
        }
    }
}

/// Attention of one query, `[N, H]`, to the tokens of a row.
fn attended(q: &Tensor, keys: &Tensor, values: &Tensor, row: &[BlockRun<'_>; 2]) -> Tensor {
    let (heads, width) = q.size2().expect("a query is [N, H]");
    let group = heads / keys.size()[1];
    // `[T, N, H]` of blocks whose dimensions come into this order: block, token, head, width.
    let gathered = |cache: &Tensor, order: [i64; 4]| {
        let of_run = |run: &BlockRun<'_>| {
            let blocks: Vec<i64> = run.blocks.iter().map(|block| i64::from(*block)).collect();
            let tokens = cache.index_select(0, &Tensor::from_slice(&blocks).to_device(cache.device())).permute(order);
            tokens.flatten(0, 1).narrow(0, 0, run.tokens as i64)
        };
        let runs: Vec<Tensor> = row.iter().filter(|run| run.tokens > 0).map(of_run).collect();
        wide(&Tensor::cat(&runs, 0)).repeat_interleave_self_int(group, 1, None)
    };
    let (k, v) = (gathered(keys, [0, 3, 1, 2]), gathered(values, [0, 2, 1, 3]));
    let scores = (wide(q).unsqueeze(0) * k).sum_dim_intlist(-1, false, Kind::Double) / (width as f64).sqrt();
    (scores.softmax(0, Kind::Double).unsqueeze(-1) * v).sum_dim_intlist(0, false, Kind::Double)
}

/// The uniform number of a key and position, as `pacs-types` has it.
fn uniform(key: u64, position: u64) -> f64 {
    let mix = |value: u64| {
        let mut z = value.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    (mix(key ^ mix(position)) >> 11) as f64 / (1u64 << 53) as f64
}

/// Weights, and which of them stay, by sorting in float64.
fn kept(logits: &Tensor, options: &RowDraw) -> (Vec<f64>, Vec<bool>) {
    let scaled: Vec<f64> = Vec::try_from((wide(logits) / options.temperature).view([-1])).expect("host");
    let max = scaled.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = scaled.iter().map(|x| (x - max).exp()).collect();
    let mut order: Vec<usize> = (0..weights.len()).collect();
    order.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(a.cmp(b)));
    let Filters { top_k, top_p, min_p } = options.filters;
    let most = if top_k == 0 { order.len() } else { top_k as usize };
    let total: f64 = order.iter().take(most).map(|token| weights[*token]).sum();
    let (mut stays, mut before) = (vec![false; weights.len()], 0.0);
    for (rank, token) in order.into_iter().enumerate() {
        let within = rank == 0 || top_p >= 1.0 || before < top_p * total;
        stays[token] = rank < most && within && weights[token] >= min_p;
        before += weights[token];
    }
    (weights, stays)
}

/// Fails unless the token lies where the uniform number says, and its numbers are those of the distribution.
fn check_drawn(drawn: &Drawn, logits: &Tensor, options: &RowDraw) {
    let (weights, stays) = kept(logits, options);
    let kept_weight = |token: usize| if stays[token] { weights[token] } else { 0.0 };
    let (total, kept_total): (f64, f64) = (weights.iter().sum(), (0..weights.len()).map(kept_weight).sum());
    let about = format!("{drawn:?} of {} with {options:?}", weights.len());
    assert!(stays[drawn.token], "what was cut off: {about}");
    let before: f64 = (0..drawn.token).map(kept_weight).sum::<f64>() / kept_total;
    let after = before + weights[drawn.token] / kept_total;
    let target = uniform(options.noise_key, options.position);
    assert!(before <= target + 1e-5 && target <= after + 1e-5, "{before} {target} {after}: {about}");
    let close = |found: f32, expected: f64, tolerance: f64| (f64::from(found) - expected).abs() < tolerance;
    assert!(close(drawn.logprob, (weights[drawn.token] / total).ln(), 2e-5), "{about}");
    assert!(close(drawn.sampled_logprob, (weights[drawn.token] / kept_total).ln(), 2e-5), "{about}");
    let entropy: f64 =
        weights.iter().filter(|weight| **weight > 0.0).map(|weight| -(weight / total) * (weight / total).ln()).sum();
    assert!(close(drawn.entropy, entropy, 1e-4), "{entropy}: {about}");
}

#[test]
fn draws_follow_the_noise_with_every_filter() {
    tch::manual_seed(4);
    for (place, kernels) in every_kernel().iter().enumerate() {
        // The slowest emulation is of the same text as others.
        let Some(vocabulary) = [5_000i64, 77, 33_000].get(place % 5).copied() else { continue };
        let mut rows = Vec::new();
        for top_k in [0, 1, 3, 50, 100_000] {
            for top_p in [1e-9, 0.4, 0.95, 1.0] {
                for min_p in [0.0, 0.02, 0.5] {
                    let temperature = 0.6 + 0.1 * (rows.len() % 9) as f64;
                    let filters = Filters { top_k, top_p, min_p };
                    rows.push(RowDraw { temperature, filters, noise_key: 77 + rows.len() as u64, position: 3 });
                }
            }
        }
        let logits = kernels.random_logits(&[rows.len() as i64, vocabulary]) * 3.0;
        let drawn = kernels.draw(&logits, &rows).expect("runs");
        for (place, (drawn, options)) in drawn.iter().zip(&rows).enumerate() {
            check_drawn(drawn, &logits.get(place as i64), options);
        }
        // A row alone is drawn as in company.
        let alone = kernels.draw(&logits.narrow(0, 40, 1), &rows[40..41]).expect("runs");
        assert_eq!(alone[0], drawn[40]);
    }
}

/// Few values, so that many tokens weigh the same, and some nothing.
#[test]
fn equal_tokens_are_kept_in_their_order() {
    tch::manual_seed(5);
    let logits = Tensor::randint(6, [3_000], (Kind::Float, Device::Cpu)) * 0.7;
    let _ = logits.narrow(0, 100, 50).fill_(f64::NEG_INFINITY);
    let mut rows = Vec::new();
    for (top_k, top_p) in [(1, 1.0), (7, 1.0), (2_000, 1.0), (0, 0.1), (0, 0.7), (40, 0.5), (0, 1.0), (5_000, 0.999)] {
        for key in 0..4 {
            let filters = Filters { top_k, top_p, min_p: 0.0 };
            rows.push(RowDraw { temperature: 1.0, filters, noise_key: key, position: 9 });
        }
    }
    for kernels in each_machine() {
        let logits_of_rows = logits.unsqueeze(0).repeat([rows.len() as i64, 1]).to_device(kernels.device());
        let drawn = kernels.draw(&logits_of_rows, &rows).expect("runs");
        for (drawn, options) in drawn.iter().zip(&rows) {
            check_drawn(drawn, &logits, options);
        }
    }
}

/// Draws of one distribution, against its exact probabilities.
#[test]
fn frequencies_are_the_probabilities() {
    let p = [0.02, 0.3, 0.07, 0.01, 0.12, 0.005, 0.2, 0.07, 0.1, 0.07, 0.03, 0.005];
    let logits = Tensor::from_slice(&p.map(|p: f64| p.ln() as f32 + 3.0));
    let draws = 2_000u64;
    let row = |i: u64| RowDraw { temperature: 1.0, filters: Filters::OFF, noise_key: 11, position: i };
    let rows: Vec<RowDraw> = (0..draws).map(row).collect();
    for kernels in each_machine() {
        let logits_of_rows = logits.unsqueeze(0).repeat([draws as i64, 1]).to_device(kernels.device());
        let mut counts = [0.0; 12];
        for drawn in kernels.draw(&logits_of_rows, &rows).expect("runs") {
            counts[drawn.token] += 1.0;
        }
        let squares: f64 = counts.iter().zip(p).map(|(n, p)| (n - p * draws as f64).powi(2) / (p * draws as f64)).sum();
        // Above this with 11 degrees of freedom once in ten thousand times.
        assert!(squares < 37.4, "chi-squared {squares}: {counts:?}");
    }
}

#[test]
fn barriers_that_are_not_reached_are_found() {
    let emulated = |kernels: &&DeviceKernels| kernels.device() == Device::Cpu;
    let Some(kernels) = every_kernel().iter().find(emulated) else { return };
    // A block of half a warp cannot be.
    let x = kernels.random(&[1, 8]);
    let arguments = [(&x).into(), (&x).into(), super::layer::number(4), 0i32.into()];
    let refused = kernels.run("silu_gate", [1, 1, 1], 16, &arguments);
    assert!(matches!(refused, Err(KernelError::Call { .. })), "{refused:?}");
}
