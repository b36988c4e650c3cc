//! Generation against the reference models, and its independence of what else is in the batch.

#[path = "../../../tests/golden/models.rs"]
mod golden_models;

use std::path::PathBuf;
use std::sync::Arc;

use pacs_model::attention::{Packed, PackedRow, packed_positions};
use pacs_model::{Model, ModelConfig, NoHooks, Parameters, RouteLog, RouteShape, Routing, score};
use pacs_rollout::{Engine, EngineOptions, Finished, GroupJob, MappedWeights, SamplingOptions, WeightsError};
use pacs_spec::Kernels;
use pacs_text::Tokenizer;
use pacs_torch::tch::{Device, Kind, Tensor, no_grad};
use pacs_torch::{DeviceKernels, Graphs, KernelError, KernelShape};
use pacs_types::{FinishReason, GroupId, NoiseKey, SampleId, VersionSpan, WeightVersion};
use pacs_weights::{Fetched, HostStore, Received, Transport, VersionId, WeightKind};

fn golden(name: &str) -> PathBuf {
    golden_models::folder().join(name)
}

fn engine(name: &str, rows: usize, end_tokens: bool) -> Engine {
    let options =
        EngineOptions { rows, prefill_tokens: 64, cache_tokens: 20_000, kernels: Kernels::Auto, cuda_graphs: true };
    engine_with(name, options, end_tokens)
}

fn engine_with(name: &str, options: EngineOptions, end_tokens: bool) -> Engine {
    // Operations of so small a model are slower on several threads.
    pacs_torch::tch::set_num_threads(1);
    let folder = golden(name);
    let mut config = ModelConfig::read(&folder).expect("golden model");
    if !end_tokens {
        config.end_tokens.clear();
    }
    let parameters = Parameters::load(&folder, &config, Kind::Float, Device::Cpu).expect("golden model");
    let tokenizer = Arc::new(Tokenizer::read(&folder).expect("golden tokenizer"));
    Engine::new(config, parameters, WeightVersion(7), Some(tokenizer), options).expect("there is room")
}

fn options(max_new_tokens: u32) -> SamplingOptions {
    SamplingOptions { temperature: 1.0, top_p: 1.0, top_k: 0, min_p: 0.0, max_new_tokens, stop: Vec::new() }
}

fn job(ticket: u64, prompt: &[u32], samples: u32, options: SamplingOptions) -> GroupJob {
    let key = |index| (index, NoiseKey::new(1, 0, SampleId { group: GroupId(ticket), index }));
    let (prompt, samples) = (prompt.to_vec(), (0..samples).map(key).collect());
    GroupJob { ticket, prompt, samples, options, records_routes: false }
}

fn run(engine: &mut Engine) -> Vec<Finished> {
    let mut finished = Vec::new();
    while !engine.is_idle() {
        finished.extend(engine.step().expect("generates"));
    }
    finished.sort_by_key(|f| (f.ticket, f.index));
    finished
}

fn finished_none(finished: &[Finished]) {
    assert!(finished.is_empty(), "no sample ends so early: {finished:?}");
}

fn expected(name: &str, tensor: &str) -> Tensor {
    let tensors = Tensor::read_safetensors(golden(name).join("expected.safetensors")).expect("golden outputs");
    tensors.into_iter().find(|(found, _)| found == tensor).expect("in every golden file").1
}

/// The golden sequences, without padding.
fn sequences(name: &str) -> Vec<Vec<u32>> {
    let (ids, lengths) = (expected(name, "input_ids"), expected(name, "lengths"));
    (0..3)
        .map(|row| {
            let ids = Vec::<i64>::try_from(ids.get(row).narrow(0, 0, lengths.int64_value(&[row]))).expect("ids");
            ids.into_iter().map(|id| id as u32).collect()
        })
        .collect()
}

#[test]
fn the_most_probable_tokens_are_the_reference_models() {
    for name in &golden_models::names() {
        let greedy = expected(name, "greedy_ids");
        let mut engine = engine(name, 8, false);
        for (ticket, prompt) in sequences(name).iter().enumerate() {
            engine.submit(job(ticket as u64, prompt, 2, SamplingOptions { top_k: 1, ..options(32) })).expect("fits");
        }
        // Every prompt was computed once for its two samples.
        let prompts: usize = sequences(name).iter().map(Vec::len).sum();
        let mut finished = run(&mut engine);
        assert_eq!(engine.counts().prompt_tokens, prompts as u64);
        let options = EngineOptions {
            rows: 8,
            prefill_tokens: 16,
            cache_tokens: 9_000,
            kernels: Kernels::Reference,
            cuda_graphs: true,
        };
        let mut reference = engine_with(name, options, false);
        for (ticket, prompt) in sequences(name).iter().enumerate() {
            reference
                .submit(job(ticket as u64, prompt, 1, SamplingOptions { top_k: 1, ..self::options(32) }))
                .expect("fits");
        }
        finished.extend(run(&mut reference));
        for finished in finished {
            let wanted = Vec::<i64>::try_from(greedy.get(finished.ticket as i64)).expect("ids");
            let got: Vec<i64> = finished.sample.tokens.iter().map(|token| i64::from(*token)).collect();
            assert_eq!(got, wanted, "{name}, sequence {}", finished.ticket);
        }
    }
}

#[test]
fn logprobs_equal_those_of_a_plain_forward() {
    let (mut preemptions, mut recomputed_tokens) = (0, 0);
    for name in &golden_models::names() {
        let prompts = sequences(name);
        let sampling = SamplingOptions { temperature: 0.8, ..options(70) };
        let sample = |options: EngineOptions| {
            let mut engine = engine_with(name, options, true);
            for (ticket, prompt) in prompts.iter().enumerate() {
                engine.submit(job(ticket as u64, prompt, 4, sampling.clone())).expect("fits");
            }
            (run(&mut engine), engine.counts())
        };
        let roomy = EngineOptions {
            rows: 5,
            prefill_tokens: 64,
            cache_tokens: 20_000,
            kernels: Kernels::Auto,
            cuda_graphs: true,
        };
        let (mut finished, counts) = sample(roomy);
        assert_eq!((finished.len(), counts.preemptions), (12, 0));
        // Prompts in pieces; a cache so small that samples have to be computed again.
        let (tight, counts) = sample(EngineOptions { rows: 12, prefill_tokens: 7, cache_tokens: 256, ..roomy });
        preemptions += counts.preemptions;
        recomputed_tokens += counts.recomputed_tokens;
        for (tight, roomy) in tight.iter().zip(&finished) {
            assert_eq!(tight.sample.tokens, roomy.sample.tokens, "{name}: tokens changed");
        }
        let (reference, _) = sample(EngineOptions { kernels: Kernels::Reference, prefill_tokens: 9, ..roomy });
        finished.extend(tight);
        finished.extend(reference);
        let config = ModelConfig::read(&golden(name)).expect("golden model");
        let parameters = Parameters::load(&golden(name), &config, Kind::Float, Device::Cpu).expect("golden model");
        let model = Model::new(&config, &parameters);
        let items = finished.iter().map(|f| (prompts[f.ticket as usize].clone(), f.sample.tokens.clone())).collect();
        let scored = score(&model, items, 0.8, 1000).expect("scores");
        for (finished, scored) in finished.iter().zip(scored) {
            for (ours, plain) in finished.sample.logprobs.iter().zip(scored) {
                assert!((ours - plain).abs() < 1e-4, "{name}: {ours} while generating, {plain} in a plain forward");
            }
        }
    }
    // Some models end their answers before the cache is full.
    assert!(preemptions > 10 && recomputed_tokens > 200, "{preemptions} and {recomputed_tokens}");
}

/// A sample that outgrows the first list of a longrope while it is generated, and one that never does.
#[test]
fn a_longrope_generates_by_one_list_what_a_plain_forward_computes() {
    let folder = golden("phi3");
    let mut config = ModelConfig::read(&folder).expect("golden model");
    config.end_tokens.clear();
    let parameters = || Parameters::load(&folder, &config, Kind::Float, Device::Cpu).expect("golden model");
    let engine = |config: &ModelConfig| {
        let options = EngineOptions {
            rows: 4,
            prefill_tokens: 64,
            cache_tokens: 2_000,
            kernels: Kernels::Auto,
            cuda_graphs: true,
        };
        Engine::new(config.clone(), parameters(), WeightVersion(7), None, options).expect("there is room")
    };
    let prompt: Vec<u32> = sequences("phi3")[2].iter().copied().cycle().take(240).collect();
    assert!(engine(&config).submit(job(0, &prompt, 2, options(40))).is_err(), "beyond the first list");
    let long = config.clone().for_sequences(280);
    let mut engine = engine(&long);
    let prompts = [&prompt[..], &prompt[..20]];
    for (ticket, prompt) in (0..).zip(prompts) {
        engine.submit(job(ticket, prompt, 2, options(40))).expect("fits");
    }
    let finished = run(&mut engine);
    let scored = |config: &ModelConfig| {
        let items = finished.iter().map(|f| (prompts[f.ticket as usize].to_vec(), f.sample.tokens.clone())).collect();
        score(&Model::new(config, &parameters()), items, 1.0, 1000).expect("scores")
    };
    let far = |scored: &[f32], finished: &Finished| {
        scored.iter().zip(&finished.sample.logprobs).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    for ((finished, long), short) in finished.iter().zip(scored(&long)).zip(scored(&config)) {
        let apart = [far(&long, finished), far(&short, finished)];
        assert!(apart[0] < 1e-4 && apart[1] > 1e-2, "group {}: {apart:?}", finished.ticket);
    }
}

#[test]
fn a_sample_does_not_depend_on_its_company() {
    let name = "qwen3";
    let prompts = sequences(name);
    let sampling = options(48);
    // On the reference path not a bit changes: neither with the company nor with the order of arrival.
    let exact = |orders: &[&[u64]], rows: usize| -> Vec<Finished> {
        let options = EngineOptions {
            rows,
            prefill_tokens: 20,
            cache_tokens: 9_000,
            kernels: Kernels::Reference,
            cuda_graphs: true,
        };
        let mut finished: Vec<Finished> = orders
            .iter()
            .flat_map(|tickets| {
                let mut engine = engine_with(name, options, false);
                for &ticket in *tickets {
                    let job = job(ticket, &prompts[ticket as usize], 3, self::options(12));
                    engine.submit(job).expect("fits");
                    // The next one arrives when this one runs.
                    finished_none(&engine.step().expect("generates"));
                }
                run(&mut engine)
            })
            .collect();
        finished.sort_by_key(|f| (f.ticket, f.index));
        finished
    };
    let apart = exact(&[&[0], &[1], &[2]], 16);
    assert_eq!(apart.len(), 9);
    for rows in [2, 9] {
        assert_eq!(exact(&[&[2, 0, 1]], rows), apart, "{rows} rows");
        assert_eq!(exact(&[&[1, 2], &[0]], rows), apart, "{rows} rows");
    }
    let alone: Vec<Finished> = (0..3u64)
        .flat_map(|ticket| {
            let mut engine = engine(name, 16, true);
            engine.submit(job(ticket, &prompts[ticket as usize], 6, sampling.clone())).expect("fits");
            run(&mut engine)
        })
        .collect();
    // Fewer rows than samples, so that groups are split and rows change places.
    for rows in [1, 5, 18] {
        let mut engine = engine(name, rows, true);
        for ticket in [2, 0, 1] {
            engine.submit(job(ticket, &prompts[ticket as usize], 6, sampling.clone())).expect("fits");
        }
        for (together, alone) in run(&mut engine).iter().zip(&alone) {
            assert_eq!(together.sample.tokens, alone.sample.tokens, "{rows} rows, group {}", alone.ticket);
        }
    }
}

#[test]
fn samples_end_at_end_tokens_stop_strings_and_the_limit() {
    let name = "llama3";
    let end_tokens = ModelConfig::read(&golden(name)).expect("golden model").end_tokens;
    let prompt = &sequences(name)[0];
    let mut first = engine(name, 64, true);
    first.submit(job(1, prompt, 64, options(30))).expect("fits");
    let finished = run(&mut first);
    for f in &finished {
        let ended = end_tokens.contains(f.sample.tokens.last().expect("never empty"));
        assert_eq!(f.sample.finish, if ended { FinishReason::Stop } else { FinishReason::Length });
        assert!(ended || f.sample.tokens.len() == 30);
        assert_eq!(f.sample.tokens.len(), f.sample.logprobs.len());
        let tokens = f.sample.tokens.len() as u32;
        assert_eq!(f.sample.version, WeightVersion(7));
        assert_eq!(f.sample.spans, [VersionSpan { version: WeightVersion(7), tokens }]);
    }
    // A stop string taken from a text that is known to come.
    let text = &finished[0].sample.text;
    let stop: String = text.chars().skip(2).take(2).collect();
    let mut second = engine(name, 64, true);
    second.submit(job(1, prompt, 64, SamplingOptions { stop: vec![stop.clone()], ..options(30) })).expect("fits");
    let stopped = &run(&mut second)[0].sample;
    assert_eq!(stopped.finish, FinishReason::Stop);
    assert!(!stopped.text.contains(&stop) && text.starts_with(&stopped.text), "{:?}", stopped.text);
}

/// Control tokens are no text for a verifier, and a stop string may still be one.
#[test]
fn samples_end_at_a_stop_string_that_is_a_control_token() {
    let (name, tokenizer) = ("qwen2-tied", Tokenizer::read(&golden("qwen2-tied")).expect("golden tokenizer"));
    let prompt = &sequences(name)[0];
    // A random model of few tokens draws some control tokens in so many answers.
    let mut free = engine(name, 64, false);
    free.submit(job(1, prompt, 64, options(40))).expect("fits");
    let finished = run(&mut free);
    let special = |f: &&Finished| f.sample.tokens.iter().position(|token| tokenizer.is_special(*token));
    let found = finished.iter().find_map(|f| Some((f, special(&f)?))).expect("one of 64 answers has a control token");
    let (free, place) = (&found.0.sample, found.1);
    let stop = tokenizer.decode(&free.tokens[place..=place], false).expect("decoded");
    let mut stopping = engine(name, 64, false);
    stopping.submit(job(1, prompt, 64, SamplingOptions { stop: vec![stop], ..options(40) })).expect("fits");
    let stopped = run(&mut stopping);
    let stopped = &stopped.iter().find(|f| f.index == found.0.index).expect("the same answer").sample;
    assert_eq!((stopped.finish, &stopped.tokens[..]), (FinishReason::Stop, &free.tokens[..=place]));
    assert_eq!(stopped.text, tokenizer.decode(&free.tokens[..place], true).expect("decoded"));
}

#[test]
fn a_cancelled_group_never_finishes() {
    let prompts = sequences("qwen3");
    let mut engine = engine("qwen3", 6, false);
    for ticket in 0..3 {
        engine.submit(job(ticket, &prompts[ticket as usize], 3, options(20))).expect("fits");
    }
    engine.step().expect("generates");
    engine.cancel(0);
    engine.cancel(2);
    let finished = run(&mut engine);
    assert_eq!(finished.iter().map(|f| (f.ticket, f.index)).collect::<Vec<_>>(), [(1, 0), (1, 1), (1, 2)]);
    assert_eq!(engine.free_samples(), 6);
}

#[test]
fn groups_that_cannot_be_generated_are_refused() {
    let mut engine = engine("qwen3", 4, true);
    assert!(engine.submit(job(1, &[], 1, options(5))).is_err(), "no prompt");
    assert!(engine.submit(job(1, &[1_000_000], 1, options(5))).is_err(), "unknown token");
    assert!(engine.submit(job(1, &[1], 1, options(0))).is_err(), "no tokens wanted");
    assert!(engine.submit(job(1, &[1], 1, options(1_000_000))).is_err(), "beyond the model's positions");
    assert!(engine.submit(job(1, &[1], 1, SamplingOptions { temperature: 0.0, ..options(5) })).is_err());
    assert!(engine.submit(job(1, &[1], 1, SamplingOptions { min_p: 1.0, ..options(5) })).is_err());
    assert!(engine.submit(job(1, &[1], 2, options(5))).is_ok());
    assert!(engine.submit(job(1, &[1], 1, options(5))).is_err(), "a ticket that is in use");
    let small =
        EngineOptions { rows: 4, prefill_tokens: 64, cache_tokens: 64, kernels: Kernels::Auto, cuda_graphs: true };
    let mut small = engine_with("qwen3", small, true);
    assert!(small.submit(job(1, &[1; 32], 64, options(64))).is_ok(), "a group whose samples fit one by one");
    let refused = small.submit(job(2, &[1; 33], 1, options(64))).expect_err("a sample that never fits");
    assert!(refused.to_string().contains("rollout.cache_tokens"), "{refused}");
}

#[test]
fn weights_may_be_replaced_while_samples_run() {
    let name = "qwen3";
    let prompt = sequences(name).remove(0);
    let mut engine = engine(name, 4, false);
    engine.submit(job(1, &prompt, 2, options(12))).expect("fits");
    for _ in 0..5 {
        assert!(engine.step().expect("generates").is_empty());
    }
    let generated = engine.counts().generated_tokens / 2;
    // Other weights: a head of zeros makes every token equally probable.
    let weights = engine.parameters_mut(WeightVersion(9));
    let _ = pacs_torch::tch::no_grad(|| weights.flat.zero_());
    let finished = run(&mut engine);
    let vocabulary = ModelConfig::read(&golden(name)).expect("golden model").vocab_size as f32;
    for Finished { sample, .. } in &finished {
        let span = |version, tokens| VersionSpan { version: WeightVersion(version), tokens };
        assert_eq!(sample.spans, [span(7, generated as u32), span(9, 12 - generated as u32)]);
        assert_eq!(sample.version, WeightVersion(7), "the oldest");
        let behind = &sample.logprobs[generated as usize..];
        assert!(behind.iter().all(|logprob| (logprob + vocabulary.ln()).abs() < 1e-4), "{behind:?}");
    }
    engine.submit(job(2, &prompt, 1, options(3))).expect("fits");
    assert_eq!(run(&mut engine)[0].sample.version, WeightVersion(9));
}

/// The same group with its experts recorded.
fn recorded(job: GroupJob) -> GroupJob {
    GroupJob { records_routes: true, ..job }
}

/// The experts that the model chooses for each token of a sequence.
fn plain_routes(model: &Model, shape: RouteShape, tokens: &[u32]) -> Vec<u8> {
    let rows = [PackedRow { prompt_len: tokens.len(), answer_lens: Vec::new() }];
    let tokens = Tensor::from_slice(&tokens.iter().map(|token| i64::from(*token)).collect::<Vec<_>>());
    let (positions, mut log) = (Tensor::from_slice(&packed_positions(&rows)), RouteLog::new(shape));
    let (mut attention, mut routing) = (Packed::new(&rows, model), Routing::Record(&mut log));
    let Ok(_) = no_grad(|| model.hidden_with_hooks(&tokens, &positions, &mut attention, &mut routing, &mut NoHooks));
    let mut routes = Vec::new();
    log.append(0..tokens.numel(), &mut routes);
    routes
}

/// Prompts in one piece and in several, rows that wait for a prompt, samples that are computed again, ends before the limit.
#[test]
fn recorded_experts_are_those_of_a_plain_forward_for_every_token_but_the_last() {
    let name = "qwen3_moe";
    let prompts = sequences(name);
    let config = ModelConfig::read(&golden(name)).expect("golden model");
    let parameters = Parameters::load(&golden(name), &config, Kind::Float, Device::Cpu).expect("golden model");
    let (model, shape) = (Model::new(&config, &parameters), RouteShape::of(&config).expect("a mixture of experts"));
    let roomy =
        EngineOptions { rows: 5, prefill_tokens: 64, cache_tokens: 20_000, kernels: Kernels::Auto, cuda_graphs: true };
    let tight = EngineOptions { rows: 12, prefill_tokens: 7, cache_tokens: 256, ..roomy };
    let reference = EngineOptions { kernels: Kernels::Reference, prefill_tokens: 9, ..roomy };
    let (mut preemptions, mut recorded_bytes, mut apart) = (0, 0, 0);
    for options in [roomy, tight, reference] {
        let mut engine = engine_with(name, options, true);
        for (ticket, prompt) in prompts.iter().enumerate() {
            engine.submit(recorded(job(ticket as u64, prompt, 4, self::options(70)))).expect("fits");
        }
        for Finished { ticket, sample, .. } in run(&mut engine) {
            let tokens = [&prompts[ticket as usize][..], &sample.tokens].concat();
            let inputs = &tokens[..tokens.len() - 1];
            assert_eq!(shape.check(&sample.routes, inputs.len()), Ok(()), "{options:?}");
            let plain = plain_routes(&model, shape, inputs);
            recorded_bytes += plain.len();
            apart += sample.routes.iter().zip(&plain).filter(|(recorded, plain)| recorded != plain).count();
        }
        preemptions += engine.counts().preemptions;
    }
    assert!(preemptions > 0 && recorded_bytes > 5000, "{preemptions} preemptions, {recorded_bytes} bytes");
    // Keys from the cache are rounded otherwise, and now and then two experts are as good as equally probable.
    assert!(apart * 1000 <= recorded_bytes, "{apart} of {recorded_bytes} bytes differ");
}

#[test]
fn experts_are_recorded_of_the_groups_that_ask_for_it() {
    let prompts = sequences("qwen3_moe");
    let mut engine = engine("qwen3_moe", 8, false);
    engine.submit(recorded(job(1, &prompts[0], 2, options(6)))).expect("fits");
    engine.submit(job(2, &prompts[1], 2, options(6))).expect("fits");
    let routes: Vec<usize> = run(&mut engine).iter().map(|finished| finished.sample.routes.len()).collect();
    // Two layers of two experts in a byte each.
    let recorded_bytes = 4 * (prompts[0].len() + 5);
    assert_eq!(routes, [recorded_bytes, recorded_bytes, 0, 0]);
    let mut dense = self::engine("qwen3", 4, true);
    let refused = dense.submit(recorded(job(1, &[1], 1, options(5)))).expect_err("a dense model");
    assert!(refused.to_string().contains("no mixture of experts"), "{refused}");
}

/// An answer that new weights take over keeps the experts of the old ones, and a prompt that they find in the making has only theirs.
#[test]
fn experts_of_a_sample_are_those_of_the_weights_that_computed_each_token() {
    let name = "qwen3_moe";
    let (prompt, token_bytes) = (sequences(name).remove(2), 4);
    let sample = |updated_after: Option<usize>| {
        let options = EngineOptions {
            rows: 2,
            prefill_tokens: 16,
            cache_tokens: 2_000,
            kernels: Kernels::Auto,
            cuda_graphs: false,
        };
        let mut engine = engine_with(name, options, false);
        engine.submit(recorded(job(1, &prompt, 1, self::options(12)))).expect("fits");
        if let Some(passes) = updated_after {
            (0..passes).for_each(|_| finished_none(&engine.step().expect("generates")));
            // Without scores all experts are equally probable, and a router takes the same two for every token.
            let _ = no_grad(|| engine.parameters_mut(WeightVersion(9)).flat.zero_());
        }
        run(&mut engine).remove(0).sample
    };
    let passes = prompt.len().div_ceil(16);
    assert!(passes > 2, "the prompt takes several passes");
    let plain = sample(None);
    let is_constant = |routes: &[u8]| routes.chunks_exact(2).all(|pair| pair == &routes[..2]);
    assert!(!is_constant(&plain.routes));

    // Five more passes: the answer has six tokens, and the newest is not computed yet.
    let continued = sample(Some(passes + 5));
    assert_eq!(continued.spans.iter().map(|span| span.tokens).collect::<Vec<_>>(), [6, 6]);
    let computed = token_bytes * (prompt.len() + 5);
    assert_eq!(continued.routes.len(), plain.routes.len());
    assert_eq!(continued.routes[..computed], plain.routes[..computed]);
    assert!(is_constant(&continued.routes[computed..]));

    let begun_anew = sample(Some(1));
    assert_eq!(begun_anew.version, WeightVersion(9));
    assert_eq!(begun_anew.routes.len(), plain.routes.len());
    assert!(is_constant(&begun_anew.routes));
}

/// Weights in a store, which a process maps; a tenth smaller than those of the model.
fn mapped(name: &str, version: u64) -> MappedWeights {
    let folder = golden(name);
    let config = ModelConfig::read(&folder).expect("golden model");
    let parameters = Parameters::load(&folder, &config, Kind::Float, Device::Cpu).expect("golden model");
    let smaller = &parameters.flat * 0.9;
    let place = tempfile::tempdir().expect("a temporary folder");
    let store = HostStore::open_in("run", &[place.path().to_owned()]).expect("a store");
    let id = VersionId::new(1, version);
    let content = pacs_torch::bytes(&smaller).expect("host memory");
    let whole = store.publish(id, WeightKind::Float32, content).expect("room");
    let received = Received { whole, transport: Transport::Shared, fetched: Fetched::default() };
    // The store and its file are gone when this returns.
    MappedWeights::map(&received, &config).expect("of this model")
}

#[test]
fn weights_that_are_mapped_in_the_middle_of_an_answer_are_those_that_were_copied() {
    let name = "qwen3";
    let prompt = sequences(name).remove(0);
    let sample = |maps: bool| {
        let mut engine = engine(name, 4, false);
        engine.submit(job(1, &prompt, 3, options(16))).expect("fits");
        (0..6).for_each(|_| finished_none(&engine.step().expect("generates")));
        if maps {
            assert!(mapped(name, 9).replace(&mut engine).expect("of this model").is_some());
        } else {
            let _ = engine.parameters_mut(WeightVersion(9)).flat.g_mul_scalar_(0.9);
        }
        engine.submit(job(2, &prompt, 1, options(4))).expect("fits");
        run(&mut engine)
    };
    let (mapped, copied) = (sample(true), sample(false));
    assert_eq!(mapped, copied);
    let versions = |finished: &Finished| finished.sample.spans.iter().map(|span| span.version.0).collect::<Vec<_>>();
    assert_eq!(mapped.iter().map(versions).collect::<Vec<_>>(), [vec![7, 9], vec![7, 9], vec![7, 9], vec![9]]);
}

#[test]
fn weights_of_another_model_are_refused() {
    let config = ModelConfig::read(&golden("llama3")).expect("golden model");
    let place = tempfile::tempdir().expect("a temporary folder");
    let store = HostStore::open_in("run", &[place.path().to_owned()]).expect("a store");
    let whole = store.publish(VersionId::new(1, 1), WeightKind::Float32, &[0; 4000]).expect("room");
    let received = Received { whole, transport: Transport::Shared, fetched: Fetched::default() };
    let refused = MappedWeights::map(&received, &config);
    assert!(matches!(refused, Err(WeightsError::OtherModel { bytes: 4000, .. })), "{refused:?}");
}

#[test]
fn what_was_cut_off_is_the_difference_of_the_log_probs() {
    let prompt = sequences("qwen3").remove(1);
    let mut engine = engine("qwen3", 8, false);
    let cut = SamplingOptions { top_k: 20, top_p: 0.9, min_p: 0.02, ..options(20) };
    engine.submit(job(1, &prompt, 4, cut)).expect("fits");
    engine.submit(job(2, &prompt, 4, options(20))).expect("fits");
    for Finished { ticket, sample, .. } in run(&mut engine) {
        if ticket == 2 {
            assert!(sample.sampled_logprobs.is_empty(), "nothing was cut off");
            assert_eq!(sample.behaviour_logprobs(), sample.logprobs);
            continue;
        }
        assert_eq!(sample.sampled_logprobs.len(), sample.tokens.len());
        let pairs = || sample.behaviour_logprobs().iter().zip(&sample.logprobs);
        assert!(pairs().all(|(sampled, plain)| sampled >= plain && *sampled <= 0.0));
        assert!(pairs().any(|(sampled, plain)| sampled > &(plain + 0.05)), "something was cut off");
    }
}

/// Many groups come, some are cancelled, the cache is too small for all: in the end every block is free again, and none is
/// ever lost on the way.
#[test]
fn a_soak_leaves_every_block_free() {
    let prompts = sequences("qwen2-tied");
    let options =
        EngineOptions { rows: 24, prefill_tokens: 24, cache_tokens: 700, kernels: Kernels::Auto, cuda_graphs: true };
    let mut engine = engine_with("qwen2-tied", options, true);
    let mut random = 1u64;
    let mut below = |end: u64| {
        random = pacs_types::mix(random);
        random % end
    };
    let (mut wanted, mut finished, mut cancelled) = (0, 0, std::collections::BTreeSet::new());
    for ticket in 1..=50u64 {
        let prompt = &prompts[below(3) as usize];
        let prompt: Vec<u32> = prompt.iter().cycle().take(1 + below(90) as usize).copied().collect();
        let samples = 1 + below(6) as u32;
        wanted += u64::from(samples);
        engine.submit(job(ticket, &prompt, samples, self::options(1 + below(110) as u32))).expect("fits");
        for _ in 0..below(25) {
            for f in engine.step().expect("generates") {
                assert!(!cancelled.contains(&f.ticket), "a cancelled sample finished");
                finished += 1;
            }
            let blocks = engine.blocks();
            assert_eq!(blocks.free + blocks.prompts + blocks.answers, blocks.total, "{blocks:?}");
            assert!(engine.running() <= 24);
        }
        if below(4) == 0 {
            let gone = 1 + below(ticket);
            let before = engine.running() + engine.waiting();
            engine.cancel(gone);
            wanted -= (before - engine.running() - engine.waiting()) as u64;
            cancelled.insert(gone);
        }
        if below(10) == 0 {
            let _ = engine.parameters_mut(WeightVersion(ticket));
        }
    }
    finished += run(&mut engine).len() as u64;
    assert_eq!(finished, wanted);
    let (blocks, counts) = (engine.blocks(), engine.counts());
    assert_eq!((blocks.free, blocks.prompts, blocks.answers), (blocks.total, 0, 0));
    assert!(counts.preemptions > 10 && counts.recomputed_tokens > 100, "{counts:?}");
}

/// The kernels of a GPU, run on a processor, generate what the engine generates without them: prompts in chunks next to rows
/// that decode, preemption, filters, and models with and without norms of heads.
#[test]
fn the_kernels_of_a_gpu_generate_the_same_samples() {
    for name in ["qwen2-untied", "qwen3", "qwen3_moe", "llama3", "smollm3"] {
        let config = ModelConfig::read(&golden(name)).expect("golden model");
        assert_eq!(config.beyond_gpu_kernels(), None, "{name}");
        let [heads, kv_heads, head_dim] = [config.heads, config.kv_heads, config.head_dim].map(|size| size as usize);
        let kernels = match DeviceKernels::emulated(KernelShape { kind: Kind::Float, heads, kv_heads, head_dim }) {
            Ok(kernels) => Arc::new(kernels),
            Err(KernelError::NoCompiler { problems }) => {
                eprintln!("skipped: no C++ compiler ({problems}); CXX names one");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let sample = |on_device: bool, by_graphs: bool| {
            let options = EngineOptions {
                rows: 6,
                prefill_tokens: 9,
                cache_tokens: 160,
                kernels: Kernels::Auto,
                cuda_graphs: true,
            };
            let mut engine = engine_with(name, options, false);
            if on_device {
                engine.use_device_kernels(Arc::clone(&kernels));
            }
            if by_graphs {
                engine.use_graphs(Graphs::emulated()).expect("room");
            }
            for (ticket, prompt) in sequences(name).iter().enumerate() {
                let top_p = if ticket == 1 { 0.9 } else { 1.0 };
                let sampling =
                    SamplingOptions { temperature: 0.8, top_p, top_k: 60 * ticket as u32, ..self::options(20) };
                engine.submit(job(ticket as u64, prompt, 2, sampling)).expect("fits");
            }
            // What was recorded before is done again with the weights of then.
            let mut finished: Vec<Finished> = (0..9).flat_map(|_| engine.step().expect("generates")).collect();
            let _ = engine.parameters_mut(WeightVersion(1)).flat.g_mul_scalar_(0.9);
            finished.extend(run(&mut engine));
            finished.sort_by_key(|finished| (finished.ticket, finished.index));
            assert_eq!(engine.recorded_passes() > 0, by_graphs);
            assert!(engine.recorded_passes() <= 4, "one a size");
            finished
        };
        // Passes with experts have products of many sizes and are never recorded.
        let by_graphs = config.beyond_graphs().is_none();
        let (device, recorded, host) = (sample(true, false), sample(true, by_graphs), sample(false, false));
        assert_eq!((device.len(), recorded.len()), (6, 6));
        for (device, host) in device.iter().chain(&recorded).zip(host.iter().cycle()) {
            assert_eq!(device.sample.tokens, host.sample.tokens, "{name}, group {}", host.ticket);
            let close = |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
            assert!(close(&device.sample.logprobs, &host.sample.logprobs), "{name}");
            assert!(close(&device.sample.sampled_logprobs, &host.sample.sampled_logprobs), "{name}");
            assert!((device.sample.entropy_sum - host.sample.entropy_sum).abs() < 1e-2, "{name}");
        }
    }
}
