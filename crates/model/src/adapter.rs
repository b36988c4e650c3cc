//! Adapters: how they start, how they are merged into their base, and PEFT's folders in and out.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;
use std::path::Path;

use pacs_shape::{Lora, ParameterSpec, WeightFileError};
use pacs_torch::dithered_bf16;
use pacs_torch::tch::{Device, Kind, TchError, Tensor, no_grad};
use pacs_types::mix;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::checkpoint::Checkpoint;
use crate::layer::gradient_kind;
use crate::save::{sync_folder, write_file, write_made, write_tensors};
use crate::{Export, ModelConfig, ModelError, ParameterLayout, Parameters};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts in front of the names of a model's parameters.
const PREFIX: &str = "base_model.model.";
/// Settings of PEFT that do not change what an adapter computes, once it is trained. Dropout is off here.
const IGNORED: [&str; 11] = [
    "task_type",
    "base_model_name_or_path",
    "inference_mode",
    "lora_dropout",
    "peft_version",
    "revision",
    "auto_mapping",
    "exclude_modules",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
];
/// Elements of a matrix that are merged at a time.
const MERGED_AT_ONCE: i64 = 1 << 22;

impl Parameters {
    /// Adapters before their first update, as PEFT makes them: `A` is uniform within one over the root of its columns (Kaiming
    /// with a = sqrt(5)), and `B` zero, so that the adapted model is its base. The head of a value model is zero, too.
    ///
    /// The same `seed` makes the same adapters on every rank: each number is a function of it and of its place, where a generator of
    /// libtorch is shared by all threads of a process.
    ///
    /// # Panics
    /// When `config` has no adapters.
    #[must_use]
    pub fn fresh_adapters(config: &ModelConfig, kind: Kind, device: Device, seed: u64) -> Self {
        assert!(config.lora.is_some(), "the configuration has no adapters");
        let (drawn, key) = (Self::zeros(config, Kind::Float, Device::Cpu), mix(seed));
        for spec in drawn.layout.parameters().iter().filter(|spec| spec.name.ends_with(".lora_A.weight")) {
            let bound = 1.0 / (spec.shape[1] as f64).sqrt();
            // 24 bits, as many as a float32 holds.
            let uniform = |place: usize| (mix(key ^ place as u64) >> 40) as f64 / f64::from(1 << 23) - 1.0;
            let places = spec.offset..spec.offset + spec.numel();
            let numbers: Vec<f32> = places.map(|place| (uniform(place) * bound) as f32).collect();
            drawn.view(&spec.name).copy_(&Tensor::from_slice(&numbers).view(&spec.shape[..]));
        }
        Self { layout: drawn.layout, flat: drawn.flat.to_kind(kind).to_device(device) }
    }

    /// Reads the folder of a PEFT adapter, converting to `kind`.
    ///
    /// # Errors
    /// When a file is missing or corrupt, when the adapter is of a kind that is not computed here, or when its rank, scale,
    /// modules or shapes are not those of `config`.
    ///
    /// # Panics
    /// When `config` has no adapters.
    pub fn load_adapters(dir: &Path, config: &ModelConfig, kind: Kind, device: Device) -> Result<Self, ModelError> {
        let lora = config.lora.as_ref().expect("the configuration has adapters");
        check_config(&dir.join(CONFIG), lora)?;
        let path = dir.join(WEIGHTS);
        let file = Checkpoint::open_file(&path)?;
        let parameters = Self::zeros(config, kind, device);
        let mut left: HashSet<&str> = file.tensors().map(|(name, ..)| name).collect();
        for spec in parameters.layout.parameters() {
            let name = format!("{PREFIX}{}", spec.name);
            if !left.remove(name.as_str()) {
                return Err(WeightFileError::Missing { place: path, tensors: vec![name] }.into());
            }
            let (_, tensor) = file.read(&name)?;
            if tensor.size() != spec.shape {
                let (expected, found) = (spec.shape.clone(), tensor.size());
                return Err(ModelError::WrongShape { file: path, tensor: name, expected, found });
            }
            parameters.view(&spec.name).f_copy_(&tensor)?;
        }
        if let Some(tensor) = left.into_iter().min() {
            let reason = "is no adapter of a linear layer that the job adapts";
            return Err(WeightFileError::Unexpected { file: path, tensor: tensor.to_owned(), reason }.into());
        }
        Ok(parameters)
    }

    /// Writes adapters as a folder that PEFT loads: `adapter_model.safetensors` in `kind`, then `adapter_config.json`.
    ///
    /// `base`: the model that they belong to, as PEFT is to find it.
    ///
    /// # Errors
    /// When a file cannot be written.
    ///
    /// # Panics
    /// When `config` has no adapters.
    pub fn save_adapters(
        &self,
        config: &ModelConfig,
        base: &str,
        out_dir: &Path,
        kind: Kind,
    ) -> Result<(), ModelError> {
        let Lora { rank, alpha, rslora, targets } = config.lora.as_ref().expect("the configuration has adapters");
        fs::create_dir_all(out_dir).map_err(ModelError::io("create", out_dir))?;
        let named = |name: &str| format!("{PREFIX}{name}");
        write_tensors(self, &out_dir.join(WEIGHTS), kind, named)?;
        // PEFT writes whole numbers without a point.
        let alpha = if alpha.fract() == 0.0 { json!(*alpha as i64) } else { json!(alpha) };
        let fields = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": rank,
            "lora_alpha": alpha,
            "lora_dropout": 0.0,
            "use_rslora": rslora,
            "use_dora": false,
            "target_modules": targets,
            "modules_to_save": null,
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "inference_mode": true,
        });
        write_file(&out_dir.join(CONFIG), format!("{fields:#}\n").as_bytes())?;
        sync_folder(out_dir)
    }

    /// Writes `W + scale B A` of every adapted matrix over that of `target`, computed in float32 from the untouched `base`: what
    /// `target` held there before does not count, so that nothing is carried from one version to the next.
    ///
    /// `self`: the adapters of `config`; `target`: a copy of `base`, on any device. 16-bit weights are rounded with a fixed threshold
    /// per element ([`dithered_bf16`]): an adapter adds less than half of the last bit of most weights at first, which rounding to
    /// nearest would lose.
    ///
    /// # Errors
    /// When libtorch refuses, most likely for want of memory.
    ///
    /// # Panics
    /// When the three do not belong to one model.
    pub fn merge_into(&self, config: &ModelConfig, base: &Self, target: &Self) -> Result<(), TchError> {
        let lora = config.lora.as_ref().expect("the configuration has adapters");
        for spec in base.layout.parameters() {
            self.merge_matrix(lora, base, spec, &target.view(&spec.name))?;
        }
        Ok(())
    }

    /// [`Parameters::merge_into`] for one parameter of the base: writes its sum with its adapter over `target`, of its shape. False where it
    /// has none, and nothing was written.
    fn merge_matrix(&self, lora: &Lora, base: &Self, spec: &ParameterSpec, target: &Tensor) -> Result<bool, TchError> {
        let Some(module) = spec.name.strip_suffix(".weight") else { return Ok(false) };
        let (device, kind) = (target.device(), gradient_kind(target.kind()));
        let matrix = |matrix: char| {
            let name = format!("{module}.lora_{matrix}.weight");
            self.layout.find(&name).map(|_| self.view(&name).f_to_kind(kind)?.f_to_device(device))
        };
        let (Some(a), Some(b)) = (matrix('A').transpose()?, matrix('B').transpose()?) else { return Ok(false) };
        no_grad(|| {
            let (b, from) = (b.f_mul_scalar(lora.scale())?, base.view(&spec.name));
            let (rows, columns) = (spec.shape[0], spec.shape[1]);
            let at_once = (MERGED_AT_ONCE / columns).clamp(1, rows);
            for first in (0..rows).step_by(at_once as usize) {
                let part = |x: &Tensor| x.f_narrow(0, first, at_once.min(rows - first));
                let sum = part(&b)?.f_matmul(&a)?;
                let sum = sum.f_add(&part(&from)?.f_to_device(device)?.f_to_kind(kind)?)?;
                let sum = match target.kind() {
                    Kind::BFloat16 => {
                        let index = spec.offset + (first * columns) as usize;
                        dithered_bf16(&sum.f_flatten(0, -1)?, index).f_view_as(&sum)?
                    }
                    _ => sum,
                };
                part(target)?.f_copy_(&sum)?;
            }
            Ok(true)
        })
    }

    /// Writes the base with these adapters merged into it as [`Parameters::export`] writes a model, one matrix after the other.
    ///
    /// # Errors
    /// As [`Parameters::export`].
    ///
    /// # Panics
    /// When `config` has no adapters.
    pub fn export_merged(
        &self,
        config: &ModelConfig,
        base: &Self,
        export: &Export,
        out_dir: &Path,
    ) -> Result<(), ModelError> {
        let lora = config.lora.as_ref().expect("the configuration has adapters");
        let kind = base.flat.kind();
        let merged = |spec: &ParameterSpec| {
            let view = base.view(&spec.name);
            let target = Tensor::empty(view.size(), (kind, Device::Cpu));
            match self.merge_matrix(lora, base, spec, &target) {
                Ok(true) => target,
                Ok(false) => view,
                Err(error) => panic!("merge `{}`: {error}", spec.name),
            }
        };
        export.write(out_dir, kind, |path| write_made(&base.layout, path, kind, str::to_owned, merged))
    }

    /// Reads a Hugging Face folder as [`Parameters::load`] does, and merges the PEFT folder `adapter` into it, where there is one.
    ///
    /// # Errors
    /// As [`Parameters::load`], [`adapter_config`] and [`Parameters::load_adapters`].
    pub fn load_with(
        dir: &Path,
        adapter: Option<&Path>,
        config: &ModelConfig,
        kind: Kind,
        device: Device,
    ) -> Result<Self, ModelError> {
        let parameters = Self::load(dir, config, kind, device)?;
        if let Some(adapter) = adapter {
            let config = adapter_config(adapter, config)?;
            let adapters = Self::load_adapters(adapter, &config, Kind::Float, device)?;
            // Each part of a matrix is read before it is written, so the base may be its own target.
            adapters.merge_into(&config, &parameters, &parameters)?;
        }
        Ok(parameters)
    }

    /// The base with these adapters merged into it, in host memory.
    ///
    /// # Errors
    /// As [`Parameters::merge_into`].
    pub fn merged(&self, config: &ModelConfig, base: &Self) -> Result<Self, TchError> {
        let layout = ParameterLayout::new(&config.base());
        let flat = Tensor::f_zeros(base.flat.size(), (base.flat.kind(), Device::Cpu))?;
        flat.shallow_clone().f_copy_(&base.flat)?;
        let merged = Self { layout, flat };
        self.merge_into(config, base, &merged)?;
        Ok(merged)
    }
}

/// The model of `config` with adapters as the PEFT folder `dir` has them: rank, scale and modules.
///
/// # Errors
/// When the folder holds no adapter, or one that is not computed here or that does not fit the model.
pub fn adapter_config(dir: &Path, config: &ModelConfig) -> Result<ModelConfig, ModelError> {
    let path = dir.join(CONFIG);
    let found = read_config(&path)?;
    let targets = match &found.target_modules {
        Value::Array(_) => found.modules(),
        Value::String(all) if all == "all-linear" => Vec::new(),
        other => {
            return Err(ModelError::config(
                &path,
                format!("`target_modules` = {other} is a pattern: list the modules"),
            ));
        }
    };
    let lora = Lora { rank: found.r, alpha: found.lora_alpha, rslora: found.use_rslora, targets };
    Ok(config.with_lora(&lora)?)
}

/// What of an adapter's configuration decides how it is computed.
#[derive(Deserialize)]
struct AdapterConfig {
    peft_type: String,
    r: i64,
    lora_alpha: f64,
    #[serde(default)]
    use_rslora: bool,
    target_modules: Value,
    #[serde(flatten)]
    others: HashMap<String, Value>,
}

impl AdapterConfig {
    /// The modules that it lists, each once; PEFT names one by its last part or by more of its path.
    fn modules(&self) -> Vec<String> {
        let listed = self.target_modules.as_array().into_iter().flatten().filter_map(Value::as_str);
        let names: BTreeSet<&str> = listed.filter_map(|name| name.rsplit('.').next()).collect();
        names.into_iter().map(str::to_owned).collect()
    }
}

/// Reads the configuration of an adapter; refuses what is not computed here.
fn read_config(path: &Path) -> Result<AdapterConfig, ModelError> {
    let text = fs::read_to_string(path).map_err(ModelError::io("read", path))?;
    let found: AdapterConfig =
        serde_json::from_str(&text).map_err(|error| ModelError::config(path, error.to_string()))?;
    let refused = |detail: String| Err(ModelError::config(path, detail));
    if found.peft_type != "LORA" {
        return refused(format!("`peft_type` is {:?}, and only \"LORA\" is supported", found.peft_type));
    }
    if found.r < 1 || !(found.lora_alpha.is_finite() && found.lora_alpha > 0.0) {
        return refused(format!("`r` = {} and `lora_alpha` = {} are no rank and scale", found.r, found.lora_alpha));
    }
    let is_used = |value: &Value| match value {
        Value::Null | Value::Bool(false) => false,
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    };
    let harmless = |key: &str, value: &Value| {
        IGNORED.contains(&key)
            || (key == "bias" && value == "none")
            // Other ways of starting change the base, too.
            || (key == "init_lora_weights" && (value.is_boolean() || value == "gaussian"))
    };
    let mut others: Vec<_> = found.others.iter().collect();
    others.sort_by_key(|(key, _)| key.as_str());
    match others.into_iter().find(|(key, value)| is_used(value) && !harmless(key, value)) {
        Some((key, value)) => refused(format!("`{key}` = {value} is not supported")),
        None => Ok(found),
    }
}

/// Refuses an adapter that is applied otherwise than the job says. Where its modules are a pattern, its tensors say which they are.
fn check_config(path: &Path, lora: &Lora) -> Result<(), ModelError> {
    let found = read_config(path)?;
    if (found.r, found.lora_alpha, found.use_rslora) != (lora.rank, lora.alpha, lora.rslora) {
        let detail = format!(
            "the adapter has rank {}, alpha {} and rslora {}, the job asks for rank {}, alpha {} and rslora {}: set \
             `model.lora` to the adapter's",
            found.r, found.lora_alpha, found.use_rslora, lora.rank, lora.alpha, lora.rslora
        );
        return Err(ModelError::config(path, detail));
    }
    let (theirs, mut ours) = (found.modules(), lora.targets.clone());
    ours.sort();
    if found.target_modules.is_array() && theirs != ours {
        let (theirs, ours) = (theirs.join(", "), ours.join(", "));
        let detail = format!("the adapter adapts {theirs}, the job {ours}: set `model.lora.targets` to the adapter's");
        return Err(ModelError::config(path, detail));
    }
    Ok(())
}
