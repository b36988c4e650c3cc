//! The keys of a mixture of experts, checked.

use std::path::Path;

use super::Experts;
use super::keys::LARGEST;
use crate::{ExpertDefaults, ShapeError};

/// What config.json says about experts.
pub(super) struct RawExperts<'a> {
    pub(super) layers: usize,
    /// One number under two keys: published files have the first one, transformers 5 writes the second.
    pub(super) counts: [(&'static str, Option<i64>); 2],
    pub(super) per_token: Option<i64>,
    pub(super) ffn: Option<i64>,
    pub(super) renormalises: Option<bool>,
    pub(super) sparse_step: Option<usize>,
    pub(super) dense_layers: &'a [usize],
    /// Of the loss that balances experts, which is no part of a policy's loss: checked and not used.
    pub(super) balance_weight: Option<f64>,
}

impl RawExperts<'_> {
    pub(super) fn resolve(self, defaults: ExpertDefaults, path: &Path) -> Result<Experts, ShapeError> {
        let refuse = |detail: String| Err(ShapeError::config(path, detail));
        let count = match self.counts {
            [(first, Some(a)), (second, Some(b))] if a != b => {
                return refuse(format!("`{first}` is {a} and `{second}` is {b}: both are the number of experts"));
            }
            [(_, a), (_, b)] => a.or(b).unwrap_or(defaults.count),
        };
        let per_token = self.per_token.unwrap_or(defaults.per_token);
        let ffn = self.ffn.unwrap_or(defaults.ffn);
        let counted = if self.counts[1].1.is_some() { self.counts[1].0 } else { self.counts[0].0 };
        for (name, value) in [(counted, count), ("num_experts_per_tok", per_token), ("moe_intermediate_size", ffn)] {
            if !(1..=LARGEST).contains(&value) {
                return refuse(format!("`{name}` is {value}, not within 1..={LARGEST}"));
            }
        }
        if per_token > count {
            return refuse(format!("`num_experts_per_tok` is {per_token}, more than the {count} of `{counted}`"));
        }
        if let Some(weight) = self.balance_weight.filter(|weight| !(weight.is_finite() && *weight >= 0.0)) {
            return refuse(format!("`router_aux_loss_coef` is {weight}, below 0"));
        }
        let step = self.sparse_step.unwrap_or(1);
        if step == 0 {
            return refuse("`decoder_sparse_step` is 0, not above 0".to_owned());
        }
        if let Some(layer) = self.dense_layers.iter().find(|layer| **layer >= self.layers) {
            return refuse(format!("`mlp_only_layers` names layer {layer}, and there are {} layers", self.layers));
        }
        let is_dense = |layer: &usize| self.dense_layers.contains(layer) || !(layer + 1).is_multiple_of(step);
        let dense_layers: Vec<usize> = (0..self.layers).filter(is_dense).collect();
        if self.layers > 0 && dense_layers.len() == self.layers {
            return refuse(format!(
                "`mlp_only_layers` and `decoder_sparse_step` = {step} leave no layer with experts: such a model is dense"
            ));
        }
        Ok(Experts { count, per_token, ffn, renormalises: self.renormalises.unwrap_or(false), dense_layers })
    }
}
