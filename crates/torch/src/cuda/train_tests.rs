//! The kernels of training on a processor, and on a GPU where there is one, against tensor operations in float64.

use half::bf16;
use tch::{Device, Kind, Tensor};

use super::tests::{each_machine, every_kernel, normed, tolerance};
use super::{DeviceKernels, KernelShape, RowCopies};
use crate::adamw::{AdamW, adamw};
use crate::dither::to_bf16;
use crate::testing::{difference, random, wide};
use crate::{bf16_ref, f32_ref};

/// Leaves of a graph in float64.
fn leaves<const N: usize>(tensors: [&Tensor; N]) -> [Tensor; N] {
    tensors.map(|tensor| wide(tensor).set_requires_grad(true))
}

#[test]
fn backwards_of_norms_and_gates_are_the_slopes() {
    tch::manual_seed(6);
    for kernels in every_kernel() {
        let kind = kernels.shape().kind;
        // The last ones are wider than what fits into registers.
        for (rows, width) in [(1, 2), (70, 24), (2, 100), (5, 896), (1, 5120), (3, 2051), (9, 8448)] {
            let [x, gradient, past] = [(); 3].map(|()| kernels.random(&[rows, width]));
            let weight = kernels.random(&[width]);
            for past in [None, Some(&past)] {
                let before = random(&[width], Kind::Float);
                let mut by_weight = before.copy().to_device(kernels.device());
                let by_x = kernels.rms_norm_backward(&x, &weight, 1e-6, &gradient, past, &mut by_weight).expect("runs");
                let [x, weight] = leaves([&x, &weight]);
                (normed(&x, &weight) * wide(&gradient)).sum(Kind::Double).backward();
                let expected = past.map_or_else(|| x.grad(), |past| x.grad() + wide(past));
                assert!(difference(&by_x, &expected) < 4.0 * tolerance(kind), "{kind:?} {rows} x {width}");
                let expected = weight.grad() + wide(&before);
                assert!(difference(&by_weight, &expected) < 1e-4, "{kind:?} {rows} x {width}");
            }
            let gate_up = kernels.random(&[rows, 2 * width]) * 3.0;
            let mut by_gate_up = gate_up.copy();
            let activation = kernels.silu_gate_backward(&mut by_gate_up, &gradient).expect("runs");
            let [gate_up] = leaves([&gate_up]);
            let parts = gate_up.chunk(2, -1);
            let expected = parts[0].silu() * &parts[1];
            (&expected * wide(&gradient)).sum(Kind::Double).backward();
            assert!(difference(&activation, &expected.detach()) < 4.0 * tolerance(kind));
            assert!(difference(&by_gate_up, &gate_up.grad()) < 4.0 * tolerance(kind), "{kind:?} {rows} x {width}");
        }
    }
}

#[test]
fn heads_are_turned_in_place_and_back() {
    tch::manual_seed(7);
    for kernels in every_kernel() {
        let KernelShape { kind, heads, head_dim, .. } = kernels.shape();
        let [n, h] = [heads, head_dim].map(|size| size as i64);
        let all = kernels.random(&[5, n + 3, h]);
        let before = all.copy();
        let angles = Tensor::randn([5, h / 2], (Kind::Float, kernels.device())) * 10.0;
        let (cos, sin) = (angles.cos(), angles.sin());
        let mut part = all.narrow(1, 1, n);
        kernels.rotate(&mut part, (&cos, &sin), false).expect("runs");
        let halves = wide(&before.narrow(1, 1, n)).chunk(2, -1);
        let (c, s) = (wide(&cos).unsqueeze(1), wide(&sin).unsqueeze(1));
        let expected = Tensor::cat(&[&halves[0] * &c - &halves[1] * &s, &halves[1] * &c + &halves[0] * &s], -1);
        assert!(difference(&part, &expected) < tolerance(kind), "{:?}", kernels.shape());
        kernels.rotate(&mut part, (&cos, &sin), true).expect("runs");
        assert!(difference(&all, &before) < 2.0 * tolerance(kind));
        for (start, len) in [(0, 1), (n + 1, 2)] {
            assert!(all.narrow(1, start, len).equal(&before.narrow(1, start, len)), "the neighbouring heads stay");
        }
    }
}

#[test]
fn copies_of_rows_are_summed() {
    tch::manual_seed(10);
    let index = [3i64, 0, 1, 3, 3, 5, 0];
    for kernels in every_kernel() {
        let kind = kernels.shape().kind;
        for width in [2, 300] {
            let tensors = [(); 2].map(|()| kernels.random(&[7, 2, width]));
            let copies = RowCopies::new(&index, 6, kernels.device());
            let sums = kernels.sum_copies(tensors.each_ref(), &copies).expect("runs");
            for (sums, tensor) in sums.iter().zip(&tensors) {
                let mut expected = Tensor::zeros([6, 2, width], (Kind::Double, Device::Cpu));
                let _ = expected.index_add_(0, &Tensor::from_slice(&index), &wide(tensor));
                assert!(difference(sums, &expected) < tolerance(kind), "{kind:?} {width}");
            }
        }
    }
}

#[test]
fn targets_are_scored_and_the_logits_become_their_slopes() {
    tch::manual_seed(8);
    for (kernels, vocabulary) in every_kernel().iter().zip([5_000i64, 77, 33_000, 320, 3].into_iter().cycle()) {
        let kind = kernels.shape().kind;
        let rows = 6;
        for (temperature, entropies_count) in [(1.0, true), (0.7, false)] {
            let logits = kernels.random_logits(&[rows, vocabulary]) * 4.0;
            // One row whose mass is all on one token, and a token that cannot be.
            let _ = logits.get(1).get(2).fill_(300.0);
            let _ = logits.get(2).get(0).fill_(f64::NEG_INFINITY);
            let targets: Vec<i64> = (0..rows).map(|row| if row == 2 { 1 } else { (row * 31) % vocabulary }).collect();
            let by_logprob = [0.5f32, -1.0, 0.25, 0.0, 2.0, -0.125];
            let by_entropy: &[f32] = if entropies_count { &[0.1, 0.2, -0.3, 0.0, 0.0, 0.4] } else { &[] };
            let here = |values: &[i64]| Tensor::from_slice(values).to_device(kernels.device());
            let by_logprobs = Tensor::from_slice(&by_logprob).to_device(kernels.device());
            let by_entropies = entropies_count.then(|| Tensor::from_slice(by_entropy).to_device(kernels.device()));
            // Float32 slopes take the place of what they are of.
            let scored = kernels
                .target_scores(
                    &logits.copy(),
                    &here(&targets),
                    Some((&by_logprobs, by_entropies.as_ref())),
                    temperature,
                )
                .expect("runs");
            let slopes = scored.by_logits.expect("slopes were given");
            assert_eq!(slopes.kind(), kind);
            let (logprobs, entropies) = (scored.logprobs, scored.entropies);
            // Finite in the graph, and of no weight.
            let [exact] = leaves([&logits.clamp_min(-1e4)]);
            let all = (&exact / temperature).log_softmax(-1, Kind::Double);
            let chosen = all.gather(1, &Tensor::from_slice(&targets).unsqueeze(1), false).squeeze_dim(1);
            let spread = -(all.exp() * &all).sum_dim_intlist(-1, false, Kind::Double);
            let mut loss = (&chosen * Tensor::from_slice(&by_logprob)).sum(Kind::Double);
            if entropies_count {
                loss += (&spread * Tensor::from_slice(by_entropy)).sum(Kind::Double);
            }
            loss.backward();
            assert!(difference(&logprobs, &chosen.detach()) < 1e-4, "{kind:?} {vocabulary}");
            assert!(difference(&entropies, &spread.detach()) < 1e-4, "{kind:?} {vocabulary}");
            assert!(difference(&slopes, &exact.grad()) < tolerance(kind), "{kind:?} {vocabulary}");
            // Without slopes nothing is written, and the scores are the same.
            let kept = logits.copy();
            let again = kernels.target_scores(&kept, &here(&targets), None, temperature).expect("runs");
            assert!(kept.equal(&logits) && again.by_logits.is_none());
            assert!(again.logprobs.equal(&logprobs) && again.entropies.equal(&entropies));
        }
    }
}

#[test]
fn weights_are_updated_as_in_host_memory() {
    for kernels in each_machine() {
        check_updates(kernels);
    }
}

fn check_updates(kernels: &DeviceKernels) {
    tch::manual_seed(9);
    let count = 70_001;
    let host = |x: &Tensor| f32_ref(&x.to_device(Device::Cpu)).expect("host").to_vec();
    let random = |size: &[i64]| random(size, Kind::Float).to_device(kernels.device());
    let (mut weights, mut moment1) = (random(&[count]), random(&[count]) * 0.01);
    let mut moment2 = random(&[count]).square() * 0.01;
    let mut compute = Tensor::zeros([count], (Kind::BFloat16, kernels.device()));
    let [mut w, mut m, mut v] = [&weights, &moment1, &moment2].map(host);
    let mut c = vec![bf16::ZERO; w.len()];
    for update in 1..=3 {
        let options = AdamW {
            learning_rate: 1e-2,
            beta1: 0.9,
            beta2: 0.999,
            epsilon: 1e-8,
            weight_decay: 0.1,
            update,
            grad_scale: 0.5,
        };
        let gradients = random(&[count]);
        adamw(&options, &mut w, &mut m, &mut v, &host(&gradients), Some((&mut c, 11)));
        let with_compute = (update != 2).then_some((&mut compute, 11));
        let moments = [&mut moment1, &mut moment2];
        kernels.adamw(&options, &mut weights, moments, &gradients, with_compute).expect("runs");
    }
    for (found, expected) in [(&weights, &w), (&moment1, &m), (&moment2, &v)] {
        assert!(difference(found, &Tensor::from_slice(expected)) < 1e-6);
    }
    for (index, (rounded, weight)) in
        bf16_ref(&compute.to_device(Device::Cpu)).expect("host").iter().zip(host(&weights)).enumerate()
    {
        assert_eq!(*rounded, to_bf16(weight, 11 + index));
    }
}
