//! How long the sequences of a job may become, and what that means for its model.

use pacs_shape::{ModelConfig, RopeScaling};

use crate::JobSpec;

impl JobSpec {
    /// Tokens of the longest sequence that the job may have: a prompt and an answer, those of evaluations included.
    #[must_use]
    pub fn longest_sequence(&self) -> usize {
        let of_sets = self.all_evaluation_sets().map(|set| set.max_new_tokens);
        let answer = of_sets.fold(self.rollout.max_new_tokens, u32::max);
        self.data.max_prompt_tokens.saturating_add(answer as usize)
    }

    /// Says that the job takes the second list of a longrope ([`ModelConfig::for_sequences`]); `None` where it does not.
    ///
    /// `config` is the model's as its folder has it.
    #[must_use]
    pub fn long_factors(&self, config: &ModelConfig) -> Option<String> {
        let (longest, end) = (self.longest_sequence(), config.max_positions);
        let has_two =
            config.rotary.iter().any(|rotary| matches!(&rotary.scaling, RopeScaling::LongRope { beyond: Some(_), .. }));
        (has_two && longest > end).then(|| {
            format!(
                "sequences may have {longest} tokens, and the model's `short_factor` ends at {end}: all sequences, short ones too, are \
                 rotated by `long_factor`"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn long_factors_are_taken_for_sequences_beyond_the_short_ones() {
        let golden = |name: &str| {
            let models = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/models");
            ModelConfig::read(&models.join(name)).expect("a golden model")
        };
        let job = |answer: u64| {
            let text = format!(
                "name = 'a'\nmodel.path = 'm'\ndata.train.path = 't.jsonl'\ndata.evaluation.path = 'e.jsonl'\n\
                 data.max_prompt_tokens = 56\nrollout.max_new_tokens = {answer}\n"
            );
            crate::parse(&text, Path::new("a.toml")).expect("a valid job")
        };
        let of_phi3 = |spec: &JobSpec| spec.long_factors(&golden("phi3"));
        let within = job(200);
        assert_eq!((within.longest_sequence(), of_phi3(&within)), (256, None));
        let beyond = job(201);
        assert_eq!(beyond.longest_sequence(), 257);
        assert!(of_phi3(&beyond).is_some_and(|said| said.contains("257 tokens") && said.contains("ends at 256")));
        assert_eq!(beyond.long_factors(&golden("llama3")), None);
    }
}
