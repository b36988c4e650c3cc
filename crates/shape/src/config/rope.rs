//! The keys of config.json that rotary embeddings are read from.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::keys::RawConfig;
use super::{LongFactors, RopeScaling, Rotary};
use crate::{Architecture, LayerRotation, ShapeError};

/// `rope_scaling`, or `rope_parameters` of transformers 5.
#[derive(Clone, Default, Deserialize)]
pub(super) struct RawRope {
    rope_type: Option<String>,
    /// The older name; writers that serve old readers and new ones write both.
    #[serde(rename = "type")]
    older_type: Option<String>,
    rope_theta: Option<f64>,
    factor: Option<f64>,
    low_freq_factor: Option<f64>,
    high_freq_factor: Option<f64>,
    original_max_position_embeddings: Option<f64>,
    partial_rotary_factor: Option<f64>,
    short_factor: Option<Vec<f64>>,
    long_factor: Option<Vec<f64>>,
    attention_factor: Option<f64>,
}

/// What config.json says of positions.
pub(super) struct Rope {
    pub(super) rotary: Vec<Rotary>,
    pub(super) max_positions: usize,
}

/// Keys of `rope_parameters` under which kinds of layers have tables of their own.
const LAYER_TYPES: [&str; 2] = ["full_attention", "sliding_attention"];

impl RawConfig {
    /// The rotary embeddings of a model whose heads have this width; that of layers with a window comes second.
    pub(super) fn rope(&self, architecture: &Architecture, head_dim: i64, path: &Path) -> Result<Rope, ShapeError> {
        let [full, sliding] = self.tables(architecture, path)?;
        let theta = full.rope_theta.or(self.rope_theta).unwrap_or(architecture.defaults.rope_theta);
        let share = full.partial_rotary_factor.or(self.partial_rotary_factor).unwrap_or(1.0);
        if share != 1.0 && !architecture.partial_rotation {
            return Err(ShapeError::Unsupported {
                path: path.to_owned(),
                feature: "partial rotary embedding".to_owned(),
                hint: "supported is partial_rotary_factor 1",
            });
        }
        if !(share > 0.0 && share <= 1.0) {
            return Err(ShapeError::config(
                path,
                format!("`partial_rotary_factor` is {share}, not above 0 and at most 1"),
            ));
        }
        let mut first = Rotary { share, ..Rotary::plain(theta) };
        let width = first.width(head_dim);
        if width < 2 || width % 2 != 0 {
            return Err(ShapeError::config(path, format!("{width} elements of a head are rotated; expected pairs")));
        }
        let (scaling, end) = self.scaling(&full, width / 2, path)?;
        first.scaling = scaling;
        let mut rotary = vec![first];
        if let LayerRotation::WindowsApart { base } = architecture.rotation {
            let (scaling, _) = self.scaling(&sliding, width / 2, path)?;
            if scaling != RopeScaling::None {
                let detail = "rope scaling of layers with a window; supported is scaling of the others";
                return Err(ShapeError::config(path, detail));
            }
            rotary.push(Rotary::plain(sliding.rope_theta.or(self.rope_local_base_freq).unwrap_or(base)));
        }
        for theta in rotary.iter().map(|rotary| rotary.theta) {
            if !(theta.is_finite() && theta > 0.0) {
                return Err(ShapeError::config(path, format!("`rope_theta` is {theta}, not above 0")));
            }
        }
        let stated = self.max_position_embeddings;
        Ok(Rope { rotary, max_positions: end.map_or(stated, |end| stated.min(end as usize)) })
    }

    /// The tables of layers without and with a window; where there is one table, the second is empty.
    fn tables(&self, architecture: &Architecture, path: &Path) -> Result<[RawRope; 2], ShapeError> {
        let read = |table: &Value| -> Result<RawRope, ShapeError> {
            let table = if table.is_null() { &Value::Object(serde_json::Map::new()) } else { table };
            serde_json::from_value(table.clone())
                .map_err(|error| ShapeError::config(path, format!("`rope_parameters`: {error}")))
        };
        let older = || self.rope_scaling.clone().unwrap_or_default();
        let Some(newer) = self.rope_parameters.as_ref().filter(|table| !table.is_null()) else {
            return Ok([older(), RawRope::default()]);
        };
        if !LAYER_TYPES.iter().any(|name| newer.get(name).is_some()) {
            return Ok([read(newer)?, RawRope::default()]);
        }
        if !matches!(architecture.rotation, LayerRotation::WindowsApart { .. }) {
            let detail = "`rope_parameters` has tables for types of layers; the layers of such a model rotate alike";
            return Err(ShapeError::config(path, detail));
        }
        let [full, sliding] = LAYER_TYPES.map(|name| newer.get(name).unwrap_or(&Value::Null));
        Ok([read(full)?, read(sliding)?])
    }

    /// How a table stretches `count` frequencies, and where positions end for it.
    fn scaling(&self, rope: &RawRope, count: i64, path: &Path) -> Result<(RopeScaling, Option<f64>), ShapeError> {
        let kind = match (rope.rope_type.as_deref(), rope.older_type.as_deref()) {
            (Some(new), Some(old)) if new != old => {
                let detail =
                    format!("rope scaling: `rope_type` is `{new}` and `type` is `{old}`; expected one of them");
                return Err(ShapeError::config(path, detail));
            }
            (new, old) => new.or(old),
        };
        let need = |name: &str, value: Option<f64>| match value {
            Some(value) if value.is_finite() && value > 0.0 => Ok(value),
            Some(value) => Err(ShapeError::config(path, format!("rope scaling: `{name}` is {value}, not above 0"))),
            None => {
                let kind = kind.unwrap_or_default();
                Err(ShapeError::config(path, format!("rope scaling of type {kind} lacks `{name}`")))
            }
        };
        let original = rope.original_max_position_embeddings;
        match kind {
            None | Some("default") => Ok((RopeScaling::None, None)),
            Some("linear") => Ok((RopeScaling::Linear { factor: need("factor", rope.factor)? }, None)),
            Some("llama3") => {
                let original = need("original_max_position_embeddings", original)?;
                let low_freq_factor = need("low_freq_factor", rope.low_freq_factor)?;
                let high_freq_factor = need("high_freq_factor", rope.high_freq_factor)?;
                if low_freq_factor >= high_freq_factor {
                    let detail = "rope scaling: `low_freq_factor` is not below `high_freq_factor`";
                    return Err(ShapeError::config(path, detail));
                }
                let factor = need("factor", rope.factor)?;
                let scaling =
                    RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions: original };
                Ok((scaling, None))
            }
            // The first name that it had.
            Some("longrope" | "su") => {
                let original = original.or(self.original_max_position_embeddings);
                let original = need("original_max_position_embeddings", original)?;
                let [factors, long] = self.factors(rope, count, path)?;
                let factor = rope.factor.unwrap_or(self.max_position_embeddings as f64 / original);
                let magnitude = match rope.attention_factor {
                    Some(magnitude) => need("attention_factor", Some(magnitude))?,
                    None if factor <= 1.0 => 1.0,
                    None => (1.0 + factor.ln() / original.ln()).sqrt(),
                };
                if original < 2.0 || !magnitude.is_finite() {
                    let detail = format!("rope scaling: `original_max_position_embeddings` is {original}, not above 1");
                    return Err(ShapeError::config(path, detail));
                }
                let max_positions = self.max_position_embeddings;
                let is_longer = max_positions > original as usize;
                let beyond = is_longer.then_some(LongFactors { factors: long, max_positions });
                Ok((RopeScaling::LongRope { factors, magnitude, beyond }, Some(original)))
            }
            Some(other) => Err(ShapeError::Unsupported {
                path: path.to_owned(),
                feature: format!("rope scaling of type `{other}`"),
                hint: "supported are default, linear, llama3 and longrope",
            }),
        }
    }

    /// The factors of sequences within the context of the first training, and of longer ones.
    fn factors(&self, rope: &RawRope, count: i64, path: &Path) -> Result<[Vec<f64>; 2], ShapeError> {
        let checked = |name: &str, factors: &Option<Vec<f64>>| {
            let Some(factors) = factors else {
                return Err(ShapeError::config(path, format!("rope scaling of type longrope lacks `{name}`")));
            };
            if factors.len() as i64 != count || factors.iter().any(|factor| !(factor.is_finite() && *factor > 0.0)) {
                let detail = format!("rope scaling: `{name}` is not {count} numbers above 0, one a frequency");
                return Err(ShapeError::config(path, detail));
            }
            Ok(factors.clone())
        };
        Ok([checked("short_factor", &rope.short_factor)?, checked("long_factor", &rope.long_factor)?])
    }
}
