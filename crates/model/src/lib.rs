//! The language model: Hugging Face folders in and out, forward and backward on libtorch.
//!
//! One [`Model`] computes all families; what they differ in is data in [`ModelConfig`] and [`Architecture`]. All parameters
//! live in one flat buffer ([`Parameters`]), and so do all gradients, so that an optimizer, a collective or a weight transfer
//! works on plain memory.
//!
//! Not here: tokenizers and chat templates, the KV cache of generation (it implements [`Attention`] for itself), the
//! objective, the optimizer. The model does not know whether it is one of many ranks.
//!
//! With adapters ([`ModelConfig::with_lora`]) the parameters of a model are those of its adapters alone; [`Model::adapted`] computes
//! with them over a frozen base, and [`Parameters::merge_into`] makes an ordinary model of both.
//!
//! Start with [`ModelConfig::read`], [`Parameters::load`] and [`Model::new`]; [`attention::Packed`] for training and
//! scoring, [`logprob`] for the vocabulary-wide end, [`values`] for that of a value model, [`import`] for GGUF files.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used, reason = "a panic is how a test fails"))]

mod adapter;
pub mod attention;
mod checkpoint;
mod error;
mod experts;
mod export;
mod feed_forward;
pub mod import;
mod kernels;
mod layer;
mod layer_hooks;
mod linear;
pub mod logprob;
mod model;
mod norm;
mod ops;
mod parameters;
mod rope;
mod routing;
mod save;
mod score;
mod value;

pub use adapter::adapter_config;
pub use attention::Attention;
pub use error::ModelError;
pub use export::Export;
pub use kernels::{kernel_shape, load_kernels, missing_kernels};
pub use layer_hooks::{LayerHooks, NoHooks, idle_backward, idle_forward};
pub use model::{Keep, Model, Trace};
pub use pacs_shape::{
    Architecture, Bucket, Experts, LayerKind, LeafSpec, Lora, ModelConfig, ParameterLayout, ParameterSpec, RopeScaling,
    Rotary, RouteShape, ShapeError,
};
pub use parameters::Parameters;
pub use routing::{RecordedRoutes, Replay, RouteLog, Routing};
pub use save::prepare_folder;
pub use score::{ScoreError, score};
pub use value::{values, values_backward};
