use super::*;
use serde_json::{Value, json};

fn read(change: impl FnOnce(&mut Value)) -> Result<ModelConfig, ShapeError> {
    let mut value = json!({
        "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512, "rope_theta": 5000.0, "eos_token_id": 7, "rope_scaling": null
    });
    change(&mut value);
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), value.to_string()).unwrap();
    ModelConfig::read(dir.path())
}

#[test]
fn older_and_newer_keys_say_the_same() {
    let older = read(|_| ()).unwrap();
    let newer = read(|value| {
        value.as_object_mut().unwrap().remove("rope_theta");
        value["rope_parameters"] = json!({"rope_theta": 5000.0, "rope_type": "default"});
    });
    assert_eq!(older, newer.unwrap());
    assert_eq!((older.rotary[0].theta, older.head_dim, older.end_tokens), (5000.0, 16, vec![7]));
}

#[test]
fn llama3_scaling_under_both_keys() {
    let scaling = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64, "rope_type": "llama3", "rope_theta": 5000.0
    });
    let older = read(|value| value["rope_scaling"] = scaling.clone()).unwrap();
    let newer = read(|value| value["rope_parameters"] = scaling).unwrap();
    assert_eq!(older, newer);
    assert!(matches!(older.rotary[0].scaling, RopeScaling::Llama3 { factor: 8.0, original_max_positions: 64.0, .. }));
}

#[test]
fn rope_scaling_may_have_both_names() {
    let scaling = json!({
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        "rope_type": "llama3", "type": "llama3"
    });
    let both = read(|value| value["rope_scaling"] = scaling.clone()).unwrap();
    let one = read(|value| {
        value["rope_scaling"] = scaling.clone();
        value["rope_scaling"].as_object_mut().unwrap().remove("rope_type");
    });
    assert_eq!(both, one.unwrap());
    assert!(matches!(both.rotary[0].scaling, RopeScaling::Llama3 { factor: 8.0, .. }));
    let other = read(|value| {
        value["rope_scaling"] = scaling.clone();
        value["rope_scaling"]["type"] = json!("linear");
    });
    assert!(other.unwrap_err().to_string().contains("`rope_type` is `llama3` and `type` is `linear`"));
}

#[test]
fn the_case_of_both_rope_names_is_read() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/cases/rope-both");
    let config = ModelConfig::read(&dir).unwrap();
    assert!(matches!(config.rotary[0].scaling, RopeScaling::Llama3 { factor: 8.0, original_max_positions: 64.0, .. }));
}

#[test]
fn a_byte_order_mark_is_no_part_of_the_text() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/llama3");
    let text = fs::read_to_string(dir.join("config.json")).unwrap();
    let path = Path::new("config.json");
    let marked = ModelConfig::from_json(&format!("\u{feff}{text}"), path).unwrap();
    assert_eq!(marked, ModelConfig::from_json(&text, path).unwrap());
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n";
    let error = ModelConfig::from_json(pointer, path).unwrap_err().to_string();
    assert!(error.contains("Git LFS"), "{error}");
}

#[test]
fn refusals_name_file_and_field() {
    let cases: [(&str, Value, &str); 11] = [
        ("model_type", json!("gemma3"), "model type `gemma3`"),
        ("hidden_act", json!("gelu"), "activation `gelu`"),
        ("attention_bias", json!(true), "attention_bias"),
        ("use_sliding_window", json!(true), "sliding-window"),
        ("layer_types", json!(["full_attention", "sliding_attention"]), "sliding-window"),
        ("partial_rotary_factor", json!(0.5), "partial rotary"),
        ("rope_scaling", json!({"type": "yarn", "factor": 4.0}), "`yarn`"),
        ("rope_scaling", json!({"type": "llama3", "factor": 4.0}), "lacks `original_max_position_embeddings`"),
        ("num_key_value_heads", json!(3), "not a multiple"),
        ("vocab_size", json!(0), "`vocab_size` is 0"),
        ("hidden_size", json!("wide"), "invalid type"),
    ];
    for (field, value, expected) in cases {
        let error = read(|config| config[field] = value).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("config.json"), "{field}: {error}");
    }
}

#[test]
fn tokens_of_the_generation_settings_come_first() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/llama3");
    assert_eq!(ModelConfig::read(&dir).unwrap().end_tokens, [379, 382]);
}

/// The golden config.json of an architecture, changed.
fn golden(name: &str, change: impl FnOnce(&mut Value)) -> Result<ModelConfig, ShapeError> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models").join(name).join("config.json");
    let mut value: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    change(&mut value);
    ModelConfig::from_json(&value.to_string(), &path)
}

fn remove(value: &mut Value, keys: &[&str]) {
    keys.iter().for_each(|key| drop(value.as_object_mut().unwrap().remove(*key)));
}

fn windows(config: &ModelConfig) -> Vec<Option<usize>> {
    (0..config.layers).map(|layer| config.layer_kind(layer).window).collect()
}

fn rotations(config: &ModelConfig) -> Vec<Option<usize>> {
    (0..config.layers).map(|layer| config.layer_kind(layer).rotary).collect()
}

#[test]
fn mistral_has_a_window_everywhere_or_nowhere() {
    assert_eq!(windows(&golden("mistral", |_| ()).unwrap()), [Some(8); 2]);
    // Mistral 7B v0.2 and later say so; a key that is not there is that of v0.1.
    assert_eq!(windows(&golden("mistral", |value| value["sliding_window"] = Value::Null).unwrap()), [None; 2]);
    let silent = golden("mistral", |value| {
        remove(value, &["sliding_window"]);
        value["max_position_embeddings"] = json!(8192);
    });
    assert_eq!(windows(&silent.unwrap()), [Some(4096); 2]);
    // It would hide nothing.
    assert_eq!(windows(&golden("mistral", |value| value["sliding_window"] = json!(512)).unwrap()), [None; 2]);
    let mixed = golden("mistral", |value| value["layer_types"] = json!(["full_attention", "sliding_attention"]));
    assert!(mixed.unwrap_err().to_string().contains("`layer_types` has layers without a window"));
    assert!(golden("mistral", |value| value["sliding_window"] = json!(0)).unwrap_err().to_string().contains("is 0"));
}

#[test]
fn qwen_has_windows_where_they_are_switched_on() {
    let with = |change: &dyn Fn(&mut Value)| {
        golden("qwen2-tied", |value| {
            value["use_sliding_window"] = json!(true);
            value["sliding_window"] = json!(16);
            change(value);
        })
    };
    assert_eq!(windows(&golden("qwen2-tied", |_| ()).unwrap()), [None; 3]);
    assert_eq!(windows(&with(&|value| value["max_window_layers"] = json!(1)).unwrap()), [None, Some(16), Some(16)]);
    let types = json!(["sliding_attention", "full_attention", "sliding_attention"]);
    let named = |value: &mut Value| value["layer_types"] = types.clone();
    assert_eq!(windows(&with(&named).unwrap()), [Some(16), None, Some(16)]);
    let errors = [
        (with(&|value| remove(value, &["max_window_layers"])), "no `layer_types` says for which layers"),
        (golden("qwen2-tied", named), "`use_sliding_window` is not true"),
        (with(&|value| value["layer_types"] = json!(["full_attention"])), "1 entries for 3 layers"),
        (
            with(&|value| value["layer_types"] = json!(["chunked_attention", "full_attention", "full_attention"])),
            "`chunked_attention`",
        ),
    ];
    for (result, expected) in errors {
        let error = result.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn smollm3_skips_the_rotation_of_some_layers() {
    assert_eq!(rotations(&golden("smollm3", |_| ()).unwrap()), [Some(0), None, Some(0)]);
    let by_default = golden("smollm3", |value| {
        remove(value, &["no_rope_layers", "no_rope_layer_interval", "layer_types"]);
        value["num_hidden_layers"] = json!(5);
    });
    assert_eq!(rotations(&by_default.unwrap()), [Some(0), Some(0), Some(0), None, Some(0)]);
    let short = golden("smollm3", |value| value["no_rope_layers"] = json!([1])).unwrap_err().to_string();
    assert!(short.contains("`no_rope_layers` has 1 entries for 3 layers"), "{short}");
}

#[test]
fn phi3_stretches_frequencies_one_by_one() {
    let config = golden("phi3", |_| ()).unwrap();
    assert_eq!((config.rotary[0].width(config.head_dim), config.max_positions), (12, 256));
    let RopeScaling::LongRope { factors, magnitude, .. } = &config.rotary[0].scaling else {
        panic!("{:?}", config.rotary)
    };
    assert_eq!(factors[5], 3.0);
    // The root of 1 + ln(512 / 256) / ln 256.
    assert!((magnitude - 1.125_f64.sqrt()).abs() < 1e-12, "{magnitude}");
    let newer = golden("phi3", |value| {
        let mut table = value["rope_scaling"].clone();
        table["rope_theta"] = value["rope_theta"].clone();
        table["partial_rotary_factor"] = value["partial_rotary_factor"].clone();
        table["original_max_position_embeddings"] = value["original_max_position_embeddings"].clone();
        table["rope_type"] = json!("longrope");
        remove(value, &["rope_scaling", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"]);
        value["rope_parameters"] = table;
    });
    assert_eq!(newer.unwrap(), config);
    let refused = |change: &dyn Fn(&mut Value), expected: &str| {
        let error = golden("phi3", change).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(&|value| value["rope_scaling"]["short_factor"] = json!([1.0, 2.0]), "`short_factor` is not 6 numbers");
    refused(&|value| remove(&mut value["rope_scaling"], &["long_factor"]), "lacks `long_factor`");
    refused(&|value| value["partial_rotary_factor"] = json!(0.7), "11 elements of a head");
    refused(&|value| value["partial_rotary_factor"] = json!(1.5), "`partial_rotary_factor` is 1.5");
    refused(&|value| remove(value, &["original_max_position_embeddings"]), "lacks `original_max_position_embeddings`");
    refused(&|value| value["lm_head_bias"] = json!(true), "lm_head_bias");
}

#[test]
fn all_sequences_have_long_factors_where_one_may_outgrow_the_short_ones() {
    let config = golden("phi3", |_| ()).unwrap();
    assert_eq!((config.max_positions, config.most_positions()), (256, 512));
    assert_eq!(config.clone().for_sequences(256), config);
    for longest in [257, 512, 9999] {
        let long = config.clone().for_sequences(longest);
        assert_eq!((long.max_positions, long.most_positions()), (512, 512));
        let RopeScaling::LongRope { factors, magnitude, beyond } = &long.rotary[0].scaling else { panic!("{long:?}") };
        assert_eq!((factors[..].last(), beyond), (Some(&30.0), &None));
        assert!((magnitude - 1.125_f64.sqrt()).abs() < 1e-12, "the same with either list");
        assert_eq!(long.clone().for_sequences(10), long, "chosen once");
    }
    // Nothing is longer than the first training.
    let short = golden("phi3", |value| value["max_position_embeddings"] = json!(200)).unwrap();
    assert_eq!((short.max_positions, short.most_positions()), (200, 200));
    assert_eq!(short.clone().for_sequences(300), short);
    let other = golden("llama3", |_| ()).unwrap();
    assert_eq!(other.clone().for_sequences(100_000), other);

    // A window that hides nothing of short sequences hides something of long ones.
    let windowed = golden("phi3", |value| value["sliding_window"] = json!(300)).unwrap();
    assert_ne!(windowed.beyond_gpu_kernels(), Some("attention within a window"));
    let windowed = windowed.for_sequences(400);
    assert_eq!(windowed.layer_kind(1).window, Some(300));
    assert_eq!(windowed.beyond_gpu_kernels(), Some("attention within a window"));
}

#[test]
fn gemma3_has_two_bases_and_a_pattern_of_windows() {
    let config = golden("gemma3", |_| ()).unwrap();
    assert_eq!(windows(&config), [Some(6), Some(6), None]);
    assert_eq!(rotations(&config), [Some(1), Some(1), Some(0)]);
    let scaled = Rotary { scaling: RopeScaling::Linear { factor: 8.0 }, ..Rotary::plain(1e6) };
    assert_eq!(config.rotary, [scaled, Rotary::plain(1e4)]);
    assert!((config.query_factor() - (16.0_f64 / 24.0).sqrt()).abs() < 1e-12);
    let newer = golden("gemma3", |value| {
        remove(value, &["rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern"]);
        value["rope_parameters"] = json!({
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}
        });
        value["layer_types"] = json!(["sliding_attention", "sliding_attention", "full_attention"]);
    });
    assert_eq!(newer.unwrap(), config);
    let left_out = golden("gemma3", |value| {
        remove(value, &["rope_local_base_freq", "rope_theta", "rope_scaling", "query_pre_attn_scalar", "head_dim"]);
    });
    let left_out = left_out.unwrap();
    assert_eq!((left_out.rotary.clone(), left_out.head_dim), (vec![Rotary::plain(1e6), Rotary::plain(1e4)], 256));
    assert_eq!((left_out.query_factor(), left_out.score_cap), (1.0, None));
    let refused = |change: &dyn Fn(&mut Value), expected: &str| {
        let error = golden("gemma3", change).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    };
    refused(&|value| value["use_bidirectional_attention"] = json!(true), "use_bidirectional_attention");
    refused(&|value| value["hidden_activation"] = json!("gelu"), "activation `gelu`");
    refused(&|value| value["sliding_window_pattern"] = json!(0), "`sliding_window_pattern` is 0");
    refused(&|value| value["query_pre_attn_scalar"] = json!(-1), "`query_pre_attn_scalar` is -1");
    refused(
        &|value| value["rope_parameters"] = json!({"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
        "rope scaling of layers with a window",
    );
    let other = golden("olmo2", |value| value["rope_parameters"] = json!({"full_attention": {"rope_theta": 1e4}}));
    assert!(other.unwrap_err().to_string().contains("tables for types of layers"));
}

#[test]
fn caps_are_off_where_config_json_says_null() {
    let config = golden("gemma2", |_| ()).unwrap();
    assert_eq!(
        (config.score_cap, config.logit_cap, windows(&config)),
        (Some(2.0), Some(6.0), vec![Some(6), None, Some(6)])
    );
    let silent =
        golden("gemma2", |value| remove(value, &["attn_logit_softcapping", "final_logit_softcapping"])).unwrap();
    assert_eq!((silent.score_cap, silent.logit_cap), (Some(50.0), Some(30.0)));
    let off = golden("gemma2", |value| value["attn_logit_softcapping"] = Value::Null).unwrap();
    assert_eq!((off.score_cap, off.logit_cap), (None, Some(6.0)));
}

#[test]
fn experts_are_those_of_either_key() {
    let config = golden("qwen3_moe", |_| ()).unwrap();
    let experts = Experts { count: 8, per_token: 2, ffn: 24, renormalises: true, dense_layers: vec![1] };
    assert_eq!(config.experts, Some(experts.clone()));
    assert_eq!([0, 1, 2].map(|layer| config.experts_of(layer).is_some()), [true, false, true]);
    // As transformers 5 writes it.
    let newer = golden("qwen3_moe", |value| {
        remove(value, &["num_experts", "rope_theta"]);
        value["num_local_experts"] = json!(8);
        value["rope_parameters"] = json!({"rope_theta": 1e6, "rope_type": "default"});
    });
    assert_eq!(newer.unwrap(), config);
    assert_eq!(golden("qwen3_moe", |value| value["num_local_experts"] = json!(8)).unwrap(), config);
    let silent = golden("qwen3_moe", |value| {
        let keys =
            ["num_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob", "decoder_sparse_step"];
        remove(value, &keys);
        remove(value, &["mlp_only_layers", "router_aux_loss_coef", "head_dim", "num_key_value_heads"]);
    });
    let silent = silent.unwrap();
    let expected = Experts { count: 128, per_token: 8, ffn: 768, renormalises: false, dense_layers: vec![] };
    assert_eq!((silent.experts, silent.head_dim, silent.kv_heads), (Some(expected), 8, 4));
    let stepped = golden("qwen3_moe", |value| {
        value["decoder_sparse_step"] = json!(2);
        value["mlp_only_layers"] = json!([]);
    });
    assert_eq!(stepped.unwrap().experts.unwrap().dense_layers, [0, 2], "every second layer has experts");
    assert_eq!(golden("qwen3", |_| ()).unwrap().experts, None);
}

#[test]
fn experts_that_contradict_themselves_are_refused_by_name() {
    let cases: [(&str, Value, &str); 12] = [
        ("num_experts", json!(0), "`num_experts` is 0"),
        ("num_local_experts", json!(4), "`num_experts` is 8 and `num_local_experts` is 4"),
        ("num_experts_per_tok", json!(9), "`num_experts_per_tok` is 9, more than the 8 of `num_experts`"),
        ("num_experts_per_tok", json!(0), "`num_experts_per_tok` is 0"),
        ("moe_intermediate_size", json!(-24), "`moe_intermediate_size` is -24"),
        ("decoder_sparse_step", json!(0), "`decoder_sparse_step` is 0"),
        ("decoder_sparse_step", json!(4), "leave no layer with experts"),
        ("mlp_only_layers", json!([3]), "`mlp_only_layers` names layer 3, and there are 3 layers"),
        ("mlp_only_layers", json!([0, 1, 2]), "leave no layer with experts"),
        ("router_aux_loss_coef", json!(-0.1), "`router_aux_loss_coef` is -0.1"),
        ("use_sliding_window", json!(true), "sliding-window"),
        ("attention_bias", json!(true), "attention_bias"),
    ];
    for (field, value, expected) in cases {
        let error = golden("qwen3_moe", |config| config[field] = value).unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains("config.json"), "{field}: {error}");
    }
}

#[test]
fn what_no_kernel_of_a_gpu_computes_is_named() {
    let beyond = |name: &str| golden(name, |_| ()).unwrap().beyond_gpu_kernels();
    for name in ["llama3", "qwen2-tied", "qwen3", "qwen3_moe", "smollm3"] {
        assert_eq!(beyond(name), None, "{name}");
    }
    let mixture = golden("qwen3_moe", |_| ()).unwrap();
    assert!(mixture.beside_gpu_kernels().is_some() && mixture.beyond_graphs().is_some());
    let full = golden("mistral", |value| value["sliding_window"] = Value::Null).unwrap();
    assert_eq!((full.beyond_gpu_kernels(), beyond("mistral")), (None, Some("attention within a window")));
    assert_eq!(beyond("olmo2"), Some("norms over all heads"));
    for name in ["phi3", "gemma2", "gemma3"] {
        assert!(beyond(name).is_some(), "{name}");
    }
}

/// The configurations of published models, and what transformers counts of them.
#[test]
fn published_configurations_have_the_published_sizes() {
    let mistral = json!({
        "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "rope_theta": 1e6, "sliding_window": null, "tie_word_embeddings": false, "vocab_size": 32768
    });
    let smollm3 = json!({
        "model_type": "smollm3", "attention_bias": false, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 11008, "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": false,
        "no_rope_layer_interval": 4, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "pretraining_tp": 2, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 5e6, "sliding_window": null,
        "use_sliding_window": false, "vocab_size": 128_256
    });
    let olmo2 = json!({
        "model_type": "olmo2", "attention_bias": false, "hidden_act": "silu", "hidden_size": 2048,
        "intermediate_size": 8192, "max_position_embeddings": 4096, "num_attention_heads": 16, "num_hidden_layers": 16,
        "num_key_value_heads": 16, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 500_000,
        "tie_word_embeddings": false, "vocab_size": 100_352
    });
    let factors = vec![1.0; 48];
    let phi4_mini = json!({
        "model_type": "phi3", "attention_bias": false, "full_attn_mod": 1, "hidden_act": "silu", "hidden_size": 3072,
        "intermediate_size": 8192, "interpolate_factor": 1, "lm_head_bias": false, "max_position_embeddings": 131_072,
        "mlp_bias": false, "num_attention_heads": 24, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096, "partial_rotary_factor": 0.75, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "rope_scaling": {"type": "longrope", "long_factor": factors, "short_factor": factors},
        "sliding_window": 262_144, "tie_word_embeddings": true, "vocab_size": 200_064
    });
    let gemma2 = json!({
        "model_type": "gemma2", "attention_bias": false, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0,
        "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
        "intermediate_size": 9216, "max_position_embeddings": 8192, "num_attention_heads": 8, "num_hidden_layers": 26,
        "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
        "sliding_window": 4096, "vocab_size": 256_000
    });
    let gemma3 = json!({
        "model_type": "gemma3_text", "attention_bias": false, "attn_logit_softcapping": null,
        "final_logit_softcapping": null, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
        "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
        "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000,
        "rope_scaling": null, "rope_theta": 1_000_000, "sliding_window": 512, "sliding_window_pattern": 6,
        "vocab_size": 262_144
    });
    let qwen3_30b_a3b = json!({
        "model_type": "qwen3_moe", "attention_bias": false, "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": true, "num_attention_heads": 32,
        "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4,
        "output_router_logits": false, "rms_norm_eps": 1e-6, "rope_scaling": null, "rope_theta": 1_000_000,
        "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
        "use_sliding_window": false, "vocab_size": 151_936
    });
    let config = ModelConfig::from_json(&qwen3_30b_a3b.to_string(), Path::new("config.json")).unwrap();
    // Of which 3.35 billion compute a token.
    assert_eq!(config.active_parameter_count(), 3_353_032_704);
    // Parameters, layers with a window, layers without rotary embedding.
    for (config, parameters, sliding, still) in [
        (mistral, 7_248_023_552, 0, 0),
        (smollm3, 3_075_098_624, 0, 9),
        (olmo2, 1_484_916_736, 0, 0),
        (phi4_mini, 3_836_021_760, 0, 0),
        (gemma2, 2_614_341_888, 13, 0),
        (gemma3, 999_885_952, 22, 0),
        (qwen3_30b_a3b, 30_532_122_624, 0, 0),
    ] {
        let config = ModelConfig::from_json(&config.to_string(), Path::new("config.json")).unwrap();
        let name = config.architecture.model_type;
        assert_eq!(config.parameter_count(), parameters, "{name}");
        assert_eq!(windows(&config).iter().flatten().count(), sliding, "{name}");
        assert_eq!(rotations(&config).iter().filter(|rotary| rotary.is_none()).count(), still, "{name}");
    }
}
