use std::collections::HashMap;
use std::path::Path;

use pacs_torch::tch::{Device, Kind, Tensor};

use crate::checkpoint::Checkpoint;
use crate::{ModelConfig, ModelError, ParameterLayout, ParameterSpec};
use pacs_shape::{EMBEDDING, Experts, LM_HEAD, StackedPart, WeightFileError};

/// All parameters of a model in one flat buffer.
#[derive(Debug)]
pub struct Parameters {
    /// Where each parameter lies.
    pub layout: ParameterLayout,
    /// `[layout.total()]`; the padding between leaves is zero.
    pub flat: Tensor,
}

impl Parameters {
    /// Parameters that are all zero.
    #[must_use]
    pub fn zeros(config: &ModelConfig, kind: Kind, device: Device) -> Self {
        let layout = ParameterLayout::new(config);
        let flat = Tensor::zeros([layout.total() as i64], (kind, device));
        Self { layout, flat }
    }

    /// Parameters of an untrained model: norms multiply by 1, biases are 0, matrices normal with a deviation of 0.02, and those that
    /// write into the residual stream smaller by the root of twice the number of layers (Radford et al. 2019).
    #[must_use]
    pub fn random(config: &ModelConfig, kind: Kind, device: Device, seed: i64) -> Self {
        const DEVIATION: f64 = 0.02;
        let parameters = Self::zeros(config, kind, device);
        pacs_torch::tch::manual_seed(seed);
        for spec in parameters.layout.parameters() {
            let mut view = parameters.view(&spec.name);
            let writes_residual = spec.name.ends_with("o_proj.weight") || spec.name.ends_with("down_proj.weight");
            let smaller = if writes_residual { (2.0 * config.layers as f64).sqrt() } else { 1.0 };
            if spec.decay {
                let _ = view.normal_(0.0, DEVIATION / smaller);
            } else if spec.name.ends_with("norm.weight") && !config.architecture.norms_add_one {
                let _ = view.fill_(1.0);
            }
        }
        parameters
    }

    /// Parameters of a value model that starts from `policy`: its trunk, and a head that is zero, so that every value is
    /// 0 at first.
    #[must_use]
    pub fn of_values(config: &ModelConfig, policy: &Self) -> Self {
        let layout = ParameterLayout::new(&config.of_values());
        let flat = Tensor::zeros([layout.total() as i64], (policy.flat.kind(), policy.flat.device()));
        let parameters = Self { layout, flat };
        for spec in parameters.layout.parameters() {
            if policy.layout.find(&spec.name).is_some() {
                parameters.view(&spec.name).copy_(&policy.view(&spec.name));
            }
        }
        parameters
    }

    /// Reads the safetensors files of a Hugging Face folder, converting to `kind`.
    ///
    /// Every parameter must be there with the configured shape, and nothing else. Experts may be stacked, one tensor for all of a
    /// layer ([`pacs_shape::StackedPart`]). Two leftovers of published
    /// checkpoints are passed over: the `inv_freq` buffers of old Llama files, and the LM head of a tied model when it
    /// equals the embedding.
    ///
    /// # Errors
    /// When a file is missing, corrupt or truncated, or its tensors are not those of the architecture.
    pub fn load(dir: &Path, config: &ModelConfig, kind: Kind, device: Device) -> Result<Self, ModelError> {
        let layout = ParameterLayout::new(config);
        let flat = Tensor::f_zeros([layout.total() as i64], (kind, device))?;
        let parameters = Self { layout, flat };
        Self::read(dir, config, |spec, tensor| Ok(parameters.view(&spec.name).f_copy_(tensor)?))?;
        Ok(parameters)
    }

    /// Reads the safetensors files of a Hugging Face folder as [`Parameters::load`] does, and hands over one parameter
    /// after the other, in the order of the layout and in the kind of the file.
    ///
    /// # Errors
    /// As [`Parameters::load`], and as `take`.
    pub fn read(
        dir: &Path,
        config: &ModelConfig,
        mut take: impl FnMut(&ParameterSpec, &Tensor) -> Result<(), ModelError>,
    ) -> Result<(), ModelError> {
        let checkpoint = Checkpoint::open(dir)?;
        let layout = ParameterLayout::new(config);
        let stacked = check_tensors(&checkpoint, &layout, config.experts.as_ref())?;
        for spec in layout.parameters() {
            let (_, tensor) = match stacked.get(&spec.name) {
                None => checkpoint.read(&spec.name)?,
                Some(part) => checkpoint.read_part(&part.name, part.first, &spec.shape)?,
            };
            take(spec, &tensor)?;
        }
        if config.tie_embeddings && checkpoint.contains(LM_HEAD) {
            let (file, head) = checkpoint.read(LM_HEAD)?;
            let (_, embedding) = checkpoint.read(EMBEDDING)?;
            if head.size() != embedding.size() || !head.f_equal(&embedding)? {
                let reason = "differs from the embedding although config.json ties them";
                let (file, tensor) = (file.to_owned(), LM_HEAD.to_owned());
                return Err(WeightFileError::Unexpected { file, tensor, reason }.into());
            }
        }
        Ok(())
    }

    /// The parameter with a Hugging Face name; shares storage with [`Parameters::flat`].
    ///
    /// # Panics
    /// When the architecture has no such parameter ([`ParameterLayout::find`] tells).
    pub fn view(&self, name: &str) -> Tensor {
        let spec = self.layout.find(name).unwrap_or_else(|| panic!("the model has no parameter `{name}`"));
        slice(&self.flat, spec.offset, &spec.shape)
    }
}

/// A shaped view into the flat buffer.
pub(crate) fn slice(flat: &Tensor, offset: usize, shape: &[i64]) -> Tensor {
    flat.narrow(0, offset as i64, shape.iter().product()).view(shape)
}

/// Compares the tensors of a checkpoint with the parameters of a model. Returns the parameters that are parts of stacked tensors,
/// by name.
fn check_tensors(
    checkpoint: &Checkpoint,
    layout: &ParameterLayout,
    experts: Option<&Experts>,
) -> Result<HashMap<String, StackedPart>, ModelError> {
    let (mut missing, mut stacked, mut stacks) = (Vec::new(), HashMap::new(), HashMap::new());
    for spec in layout.parameters().iter().filter(|spec| !checkpoint.contains(&spec.name)) {
        match experts.and_then(|experts| spec.stacked(experts)).filter(|part| checkpoint.contains(&part.name)) {
            Some(part) => {
                stacks.insert(part.name.clone(), part.shape.clone());
                stacked.insert(spec.name.clone(), part);
            }
            None => missing.push(spec.name.clone()),
        }
    }
    if !missing.is_empty() {
        let place = checkpoint.place().to_owned();
        return Err(WeightFileError::Missing { place, tensors: missing }.into());
    }
    for (name, file, shape) in checkpoint.tensors() {
        let Some(expected) = layout.find(name).map(|spec| &spec.shape).or_else(|| stacks.get(name)) else {
            if name == LM_HEAD || name.ends_with(".rotary_emb.inv_freq") {
                continue;
            }
            let reason = "the architecture does not have";
            let (file, tensor) = (file.to_owned(), name.to_owned());
            return Err(WeightFileError::Unexpected { file, tensor, reason }.into());
        };
        if expected != shape {
            let (expected, found) = (expected.clone(), shape.to_vec());
            return Err(ModelError::WrongShape { file: file.to_owned(), tensor: name.to_owned(), expected, found });
        }
    }
    Ok(stacked)
}
