//! How much training a model computes, by arithmetic: what utilisation is reported by, and what work is shared out by.

use crate::{ModelConfig, ParameterLayout, ParameterSpec};

/// What a pass has to compute, whatever the model.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PassWork {
    /// Tokens that go through the trunk.
    pub tokens: f64,
    /// Positions that go through the head.
    pub targets: f64,
    /// Pairs of a token with one that it sees.
    pub pairs: f64,
}

impl PassWork {
    /// A prompt and the answers after it, every token of which is scored.
    #[must_use]
    pub fn row(prompt: usize, answers: &[usize]) -> Self {
        let mut work = Self { targets: answers.iter().sum::<usize>() as f64, ..Self::default() };
        work.add_row(prompt, answers);
        work
    }

    /// Adds a prompt and the answers after it, each of which sees the prompt and itself.
    pub fn add_row(&mut self, prompt: usize, answers: &[usize]) {
        let own = |tokens: usize| (tokens * (tokens + 1)) as f64 / 2.0;
        self.tokens += (prompt + answers.iter().sum::<usize>()) as f64;
        self.pairs += own(prompt) + answers.iter().map(|&answer| own(answer) + (answer * prompt) as f64).sum::<f64>();
    }
}

/// Floating-point operations of one forward and backward of a model: two for each weight and token going forward, four
/// going backward, two where a weight is frozen. Of experts those count that compute a token. Norms, activations and softmax are not counted, nor is what is computed twice. Layers with a window count
/// as those without.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Flops {
    per_token: f64,
    per_target: f64,
    per_pair: f64,
}

impl Flops {
    /// Of a model whose head has `rows` rows.
    #[must_use]
    pub fn new(config: &ModelConfig, rows: i64) -> Self {
        let weights = |config: &ModelConfig| -> f64 {
            let layout = ParameterLayout::new(config);
            let in_layers =
                layout.parameters().iter().filter(|spec| spec.decay && spec.name.starts_with("model.layers."));
            let (of_experts, others): (Vec<_>, Vec<_>) = in_layers.partition(|spec| spec.is_of_expert());
            let count = |specs: Vec<&ParameterSpec>| specs.into_iter().map(ParameterSpec::numel).sum::<usize>() as f64;
            let share = config.experts.as_ref().map_or(0.0, |of| of.per_token as f64 / of.count as f64);
            count(others) + share * count(of_experts)
        };
        let (per_token, of_head) = match &config.lora {
            None => (6.0 * weights(config), 6),
            // A value model's head of one row is trained, which does not count.
            Some(_) => (4.0 * weights(&config.base()) + 6.0 * weights(config), 4),
        };
        let heads = (config.layers as i64 * config.heads * config.head_dim) as f64;
        Self {
            per_token,
            per_target: (of_head * rows * config.hidden) as f64,
            // Queries with keys, weights with values.
            per_pair: 12.0 * heads,
        }
    }

    /// Of a model that is not known, but for a factor: every token is as much work as any other.
    #[must_use]
    pub fn of_any_model() -> Self {
        Self { per_token: 1.0, per_target: 0.0, per_pair: 0.0 }
    }

    /// Those of a pass.
    #[must_use]
    pub fn of(&self, work: PassWork) -> f64 {
        self.per_token * work.tokens + self.per_target * work.targets + self.per_pair * work.pairs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_counted_as_the_model_computes_them() {
        let mut work = PassWork::default();
        work.add_row(3, &[2, 1]);
        // The prompt: 1 + 2 + 3; the answers: 4 + 5, and 4.
        assert_eq!((work.tokens, work.pairs), (6.0, 19.0));
        assert_eq!(PassWork::row(3, &[2, 1]), PassWork { targets: 3.0, ..work });
        work.add_row(2, &[]);
        assert_eq!((work.tokens, work.pairs), (8.0, 22.0));
    }

    #[test]
    fn operations_are_six_a_weight_and_token() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models/qwen3");
        let config = ModelConfig::read(&folder).unwrap();
        let flops = Flops::new(&config, config.vocab_size);
        // Three layers of width 64: queries and outputs of 4 heads of 32, keys and values of 2, feed-forward of 144.
        let weights = 3.0 * (64.0 * 128.0 * 2.0 + 64.0 * 64.0 * 2.0 + 3.0 * 64.0 * 144.0);
        assert_eq!(flops.of(PassWork { tokens: 1.0, ..PassWork::default() }), 6.0 * weights);
        let folder = folder.with_file_name("qwen3_moe");
        let mixture = ModelConfig::read(&folder).unwrap();
        // Two layers with a router of 8 rows and two experts a token, and one that is dense.
        let weights = 3.0 * (32.0 * 64.0 * 2.0 + 32.0 * 32.0 * 2.0)
            + 2.0 * (8.0 * 32.0 + 2.0 * 3.0 * 32.0 * 24.0)
            + 3.0 * 32.0 * 48.0;
        let sparse = Flops::new(&mixture, mixture.vocab_size);
        assert_eq!(sparse.of(PassWork { tokens: 1.0, ..PassWork::default() }), 6.0 * weights);
        assert_eq!(flops.of(PassWork { targets: 1.0, ..PassWork::default() }), 6.0 * 384.0 * 64.0);
        assert_eq!(flops.of(PassWork { pairs: 1.0, ..PassWork::default() }), 12.0 * 3.0 * 128.0);
    }
}
