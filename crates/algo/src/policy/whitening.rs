use super::normaliser::MEAN_EPSILON;
use crate::ObjectiveError;

/// Added to the variance before taking its root.
const VARIANCE_EPSILON: f64 = 1e-8;

/// Count, mean and sum of squared distances of a set of numbers; moments of parts combine to those of the whole.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Moments {
    pub(crate) count: f64,
    pub(crate) mean: f64,
    pub(crate) squares: f64,
}

impl Moments {
    pub(crate) fn of(values: &[f64]) -> Self {
        let count = values.len() as f64;
        let mean = values.iter().sum::<f64>() / count.max(1.0);
        Self { count, mean, squares: values.iter().map(|value| (value - mean) * (value - mean)).sum() }
    }
}

/// Shift and scale that normalise numbers to mean 0 and deviation 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Whitening {
    mean: f64,
    deviation: f64,
}

impl Whitening {
    /// Combines the moments of all parts. Their order decides the last bits, so every rank has to pass the same order.
    pub(crate) fn new(parts: &[Moments]) -> Result<Self, ObjectiveError> {
        let count: f64 = parts.iter().map(|part| part.count).sum();
        if count < 2.0 {
            return Err(ObjectiveError::TooFewTokens);
        }
        let mean = parts.iter().map(|part| part.count * part.mean).sum::<f64>() / (count + MEAN_EPSILON);
        let squares: f64 =
            parts.iter().map(|part| part.squares + part.count * (part.mean - mean) * (part.mean - mean)).sum();
        let variance = squares / (count + MEAN_EPSILON) * count / (count - 1.0);
        Ok(Self { mean, deviation: (variance + VARIANCE_EPSILON).sqrt() })
    }

    pub(crate) fn apply(&self, values: &mut [f64]) {
        for value in values {
            *value = (*value - self.mean) / self.deviation;
        }
    }
}
