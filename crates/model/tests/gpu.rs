//! Log-probs and gradients in bfloat16 on a GPU, against float32 in host memory. In a file of its own, since libtorch is asked
//! for CUDA before anything else.

#[path = "../../../tests/golden/models.rs"]
mod golden_models;

use pacs_model::attention::{Packed, PackedRow, packed_positions};
use pacs_model::logprob::{Targets, head_backward};
use pacs_model::{Keep, Model, ModelConfig, Parameters, load_kernels};
use pacs_torch::tch::{Device, Kind, Tensor};
use pacs_torch::with_device_kernels;

/// Log-probs and gradients, in float32 and host memory.
fn run(name: &str, device: Device, kind: Kind) -> [Tensor; 2] {
    let folder = golden_models::folder().join(name);
    let config = ModelConfig::read(&folder).expect("golden model");
    let parameters = Parameters::load(&folder, &config, kind, device).expect("golden model");
    let model = Model::new(&config, &parameters);
    let row = |prompt_len: usize, answers: &[usize]| PackedRow { prompt_len, answer_lens: answers.to_vec() };
    let rows = [row(9, &[5, 1, 40]), row(30, &[]), row(2, &[70])];
    let positions = Tensor::from_slice(&packed_positions(&rows)).to_device(device);
    let count = positions.numel() as u64;
    let tokens: Vec<i64> = (0..count).map(|i| (i * i * 31 + 7 * i) as i64 % config.vocab_size).collect();
    let work = || {
        let gradients = model.zero_gradients();
        let attention = Packed::new(&rows, &model);
        let trace = model.forward(&Tensor::from_slice(&tokens).to_device(device), &positions, attention, Keep::Last(1));
        let coefficients: Vec<f32> = (0..count).map(|i| if i % 3 == 0 { 1.0 } else { -0.5 }).collect();
        let targets =
            Targets { tokens: &tokens, coefficients: &coefficients, entropy_coefficients: &[], temperature: 1.0 };
        let head = head_backward(&model, trace.hidden(), targets, 32, &gradients);
        model.backward(trace, &head.by_hidden, &gradients);
        [Tensor::from_slice(&head.logprobs), gradients.to_device(Device::Cpu)]
    };
    let kernels = match config.beyond_gpu_kernels() {
        Some(_) => None,
        None => load_kernels(&config, kind, device).expect("a GPU has kernels"),
    };
    match kernels {
        Some(kernels) => with_device_kernels(&kernels, work),
        None => work(),
    }
}

#[test]
fn gradients_are_those_of_host_memory() {
    let gpu = pacs_torch::init(true, 1);
    for name in &golden_models::names() {
        let expected = run(name, Device::Cpu, Kind::Float);
        let mut devices = vec![Device::Cpu];
        match &gpu {
            Ok(gpu) => devices.push(*gpu),
            Err(error) => eprintln!("skipped on a GPU: {error}"),
        }
        for device in devices {
            let found = run(name, device, Kind::BFloat16);
            for (what, (found, expected)) in ["log-probs", "gradients"].iter().zip(found.iter().zip(&expected)) {
                let apart = (found - expected).norm().double_value(&[]) / expected.norm().double_value(&[]);
                println!("{name} {device:?}: {what} {apart:.1e}");
                // What bfloat16 rounds off, and no more.
                assert!(apart < 0.08, "{name} {device:?}: {what} are {apart} apart");
            }
        }
    }
}
